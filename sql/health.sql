-- name: version :value
SELECT max(version)
FROM schema_migrations
