-- name: enqueue :count
INSERT INTO mails (purpose, email)
VALUES (%(purpose)s, %(email)s)

-- Claims the next due mail by moving its due time to the next attempt: half a minute, a minute,
-- two …, at most an hour later. So no lock is held while talking to a mail server.
-- name: take :one
-- index: mails_due_idx
WITH taken AS (
    UPDATE mails
    SET attempts = attempts + 1,
        due_at = now() + least(interval '30 s' * 2.0 ^ least(attempts, 10), interval '1 hour')
    WHERE id = (
        SELECT id
        FROM mails
        WHERE due_at <= now()
        ORDER BY due_at
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id, purpose, email
)
SELECT t.id, t.purpose, t.email, u.id AS user_id, u.name
FROM taken t
LEFT JOIN users u ON u.email = t.email

-- name: issue :count
INSERT INTO mail_tokens (token_hash, user_id, purpose, email, expires_at)
VALUES (%(token_hash)s, %(user_id)s, %(purpose)s, %(email)s,
        now() + make_interval(mins => %(minutes)s))

-- name: done :count
DELETE FROM mails
WHERE id = %(id)s
