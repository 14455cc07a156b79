-- Who calls: user, role and session in one look-up by two keys.
-- name: caller :one
-- index: sessions_user_idx
-- index: users_pkey
SELECT u.id, u.role, u.email, s.id AS session_id,
       s.last_used_at < now() - interval '1 minute' AS idle
FROM sessions s
JOIN users u ON u.id = s.user_id
WHERE s.id = %(session_id)s::bigint AND s.user_id = %(user_id)s::bigint AND s.expires_at > now()

-- name: touch :count
-- index: sessions_pkey
UPDATE sessions
SET last_used_at = now()
WHERE id = %(session_id)s::bigint

-- name: credentials :one
-- index: users_email_idx
SELECT id, email, password_hash, email_verified
FROM users
WHERE email = %(email)s

-- name: credentials_by_id :one
-- index: users_pkey
SELECT id, email, password_hash, email_verified
FROM users
WHERE id = %(id)s::bigint

-- Counts an attempt before it is checked, so that only five of many concurrent ones are. A success
-- deletes the row. The wait starts at 5 s with the fifth failure and doubles up to an hour; after a
-- day without attempts the count restarts. No row returned means go ahead; a row has the seconds
-- left to wait, and whether the attempts that caused the block may still be in progress.
-- name: attempt :one
-- index: login_failures_pkey
WITH counted AS (
    INSERT INTO login_failures AS f (account, address, failures, blocked_until)
    VALUES (sha256(convert_to(%(email)s, 'UTF8')), %(address)s, 1, '-infinity')
    ON CONFLICT (account, address) DO UPDATE
    SET failures = CASE WHEN f.last_at < now() - interval '1 day' THEN 1 ELSE f.failures + 1 END,
        blocked_until = CASE
            WHEN f.last_at < now() - interval '1 day' OR f.failures < 4 THEN '-infinity'
            ELSE now() + least(interval '5 s' * 2.0 ^ least(f.failures - 4, 20), interval '1 hour')
        END,
        last_at = now()
    WHERE f.blocked_until <= now()
    RETURNING 1
)
-- (If the block is not visible yet, a concurrent attempt has caused it.)
SELECT coalesce(max(ceil(extract(epoch FROM blocked_until - now()))::int), 5) AS wait,
       coalesce(bool_or(last_at > now() - interval '1 s'), true) AS fresh
FROM login_failures
WHERE account = sha256(convert_to(%(email)s, 'UTF8')) AND address = %(address)s
  AND blocked_until > now()
HAVING NOT EXISTS (SELECT FROM counted)

-- name: forgive :count
-- index: login_failures_pkey
DELETE FROM login_failures
WHERE account = sha256(convert_to(%(email)s, 'UTF8')) AND address = %(address)s

-- name: rehash :count
-- index: users_pkey
UPDATE users
SET password_hash = %(new)s
WHERE id = %(id)s::bigint AND password_hash = %(old)s

-- name: register :value
INSERT INTO users (email, name, password_hash)
VALUES (%(email)s, %(name)s, %(password_hash)s)
RETURNING id

-- The condition on the hash ends the race with a password change that came between check and login.
-- name: open :value
-- index: users_pkey
WITH user_seen AS (
    UPDATE users
    SET last_login = now()
    WHERE id = %(user_id)s::bigint AND password_hash = %(password_hash)s
    RETURNING id
)
INSERT INTO sessions (user_id, expires_at, address, user_agent)
SELECT id, now() + make_interval(days => %(days)s), %(address)s, %(user_agent)s
FROM user_seen
RETURNING id

-- name: drop_expired :count
-- index: sessions_user_idx
DELETE FROM sessions
WHERE user_id = %(user_id)s::bigint AND expires_at <= now()

-- However often a refresh token is used, only one use finds its generation.
-- name: rotate :value
-- index: sessions_user_idx
UPDATE sessions
SET generation = generation + 1, rotated_at = now(), last_used_at = now(),
    expires_at = least(now() + make_interval(days => %(days)s),
                       created_at + make_interval(days => %(max_days)s))
WHERE id = %(session_id)s::bigint AND user_id = %(user_id)s::bigint
  AND generation = %(generation)s AND expires_at > now()
RETURNING generation

-- For a concurrent use of the same token that came second: the current generation.
-- name: rotated_just_now :value
-- index: sessions_user_idx
SELECT generation
FROM sessions
WHERE id = %(session_id)s::bigint AND user_id = %(user_id)s::bigint
  AND generation - 1 = %(generation)s AND expires_at > now()
  AND rotated_at > now() - interval '10 seconds'

-- name: list :rows
-- index: sessions_user_idx
SELECT id, created_at, last_used_at, expires_at, address, user_agent,
       id = %(current)s::bigint AS current
FROM sessions
WHERE user_id = %(user_id)s::bigint AND expires_at > now()
ORDER BY last_used_at DESC, id DESC
LIMIT 1000

-- name: close :count
-- index: sessions_user_idx
DELETE FROM sessions
WHERE id = %(session_id)s::bigint AND user_id = %(user_id)s::bigint

-- Every session of a user, but for the one to be kept, if any.
-- name: close_all :count
-- index: sessions_user_idx
DELETE FROM sessions
WHERE user_id = %(user_id)s::bigint AND id IS DISTINCT FROM %(keep)s::bigint

-- The old hash as a condition: of two changes at once, one wins.
-- name: change_password :count
-- index: users_pkey
UPDATE users
SET password_hash = %(new)s, updated_at = now()
WHERE id = %(user_id)s::bigint AND password_hash = %(old)s

-- A new password makes every link in older mails void.
-- name: void_mail_tokens :count
-- index: mail_tokens_user_idx
DELETE FROM mail_tokens
WHERE user_id = %(user_id)s::bigint

-- Uses a token up. It is not valid if the user's address has changed since.
-- name: redeem :one
-- index: mail_tokens_pkey
DELETE FROM mail_tokens t
USING users u
WHERE t.token_hash = %(token_hash)s AND t.purpose = %(purpose)s AND t.expires_at > now()
  AND u.id = t.user_id AND u.email = t.email
RETURNING u.id, u.email

-- A link that came by mail proves the address, too.
-- name: reset_password :count
-- index: users_pkey
UPDATE users
SET password_hash = %(new)s, email_verified = true, updated_at = now()
WHERE id = %(user_id)s::bigint

-- name: verify_email :count
-- index: users_pkey
UPDATE users
SET email_verified = true, updated_at = now()
WHERE id = %(user_id)s::bigint AND NOT email_verified
