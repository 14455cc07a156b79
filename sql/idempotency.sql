-- Whether no other request with this key is running. A second one is refused at once, not queued.
-- name: lock :value
SELECT pg_try_advisory_xact_lock(hashtextextended(%(key)s, %(user_id)s))

-- A separate statement after the lock, so that it sees what the lock's last holder committed.
-- name: get :one
SELECT request_hash, status, location, body
FROM idempotency_keys
WHERE user_id = %(user_id)s AND key = %(key)s AND created_at > now() - interval '24 hours'

-- An expired answer of the same key makes room.
-- name: keep :count
INSERT INTO idempotency_keys (user_id, key, request_hash, status, location, body)
VALUES (%(user_id)s, %(key)s, %(request_hash)s, %(status)s, %(location)s, %(body)s)
ON CONFLICT (user_id, key) DO UPDATE
SET request_hash = excluded.request_hash, status = excluded.status, location = excluded.location,
    body = excluded.body, created_at = now()
