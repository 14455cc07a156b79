-- name: version :value
SELECT max(version)
FROM schema_migrations

-- name: state :one
SELECT coalesce((SELECT max(version) FROM schema_migrations), 0) AS schema_version,
       (SELECT count(*) FROM mails) AS mails_waiting,
       coalesce((SELECT extract(epoch FROM now() - min(created_at)) FROM mails), 0)::float8
           AS oldest_mail_seconds,
       (SELECT (now() AT TIME ZONE 'UTC')::date - until FROM sales_sealed) AS unsealed_days
