-- Deletes expired rows a thousand at a time, skipping those locked by another transaction.

-- name: expire_keys :count
-- index: idempotency_keys_created_idx
DELETE FROM idempotency_keys
WHERE (user_id, key) IN (
    SELECT user_id, key
    FROM idempotency_keys
    WHERE created_at < now() - interval '24 hours'
    ORDER BY created_at
    LIMIT 1000
    FOR UPDATE SKIP LOCKED
)

-- name: expire_sessions :count
-- index: sessions_expires_idx
DELETE FROM sessions
WHERE id IN (
    SELECT id
    FROM sessions
    WHERE expires_at < now()
    ORDER BY expires_at
    LIMIT 1000
    FOR UPDATE SKIP LOCKED
)

-- name: expire_failures :count
-- index: login_failures_last_idx
DELETE FROM login_failures
WHERE (account, address) IN (
    SELECT account, address
    FROM login_failures
    WHERE last_at < now() - interval '1 day'
    ORDER BY last_at
    LIMIT 1000
    FOR UPDATE SKIP LOCKED
)

-- Links that are over, and mails that nobody could send for three days.
-- name: expire_mail :count
WITH tokens AS (DELETE FROM mail_tokens WHERE expires_at < now())
DELETE FROM mails
WHERE created_at < now() - interval '3 days'

-- name: seal_sales :value
SELECT seal_sales()

-- name: fold_counts :value
SELECT fold_product_counts()
