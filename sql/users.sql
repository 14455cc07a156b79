-- Users in the shape of a version of the API.
-- name: page :column replan
SELECT CASE %(version)s::int
       WHEN 1 THEN (SELECT row_to_json(v)::text FROM users_v1 v WHERE v.id = k.id)
       ELSE (SELECT row_to_json(v)::text FROM users_v2 v WHERE v.id = k.id) END
FROM (
    SELECT u.id
    FROM users u
    WHERE (%(role)s::text IS NULL OR u.role = %(role)s)
      AND (%(pattern)s::text IS NULL
           OR lower(u.email || E'\x1f' || u.name) LIKE '%' || lower(%(pattern)s) || '%')
      AND (%(after_id)s::bigint IS NULL OR CASE %(sort)s::text
           WHEN 'created_at' THEN (u.created_at, u.id) > (%(after)s::text::timestamptz, %(after_id)s)
           WHEN '-created_at' THEN (u.created_at, u.id) < (%(after)s::text::timestamptz, %(after_id)s)
           WHEN 'name' THEN (lower(u.name) COLLATE "C", u.id) > (lower(%(after)s::text), %(after_id)s)
           WHEN '-name' THEN (lower(u.name) COLLATE "C", u.id) < (lower(%(after)s::text), %(after_id)s)
           WHEN 'email' THEN (u.email, u.id) > (%(after)s::text, %(after_id)s)
           WHEN '-email' THEN (u.email, u.id) < (%(after)s::text, %(after_id)s)
           END)
    ORDER BY
        CASE WHEN %(sort)s = 'created_at' THEN u.created_at END,
        CASE WHEN %(sort)s = '-created_at' THEN u.created_at END DESC,
        CASE WHEN %(sort)s = 'name' THEN lower(u.name) COLLATE "C" END,
        CASE WHEN %(sort)s = '-name' THEN lower(u.name) COLLATE "C" END DESC,
        CASE WHEN %(sort)s = 'email' THEN u.email END,
        CASE WHEN %(sort)s = '-email' THEN u.email END DESC,
        CASE WHEN left(%(sort)s, 1) = '-' THEN u.id END DESC,
        u.id
    LIMIT %(limit)s::bigint OFFSET %(offset)s::bigint
) k

-- name: count :value replan
SELECT count(*)
FROM users u
WHERE (%(role)s::text IS NULL OR u.role = %(role)s)
  AND (%(pattern)s::text IS NULL
       OR lower(u.email || E'\x1f' || u.name) LIKE '%' || lower(%(pattern)s) || '%')

-- name: get :json
-- index: users_pkey
SELECT id, email, name, role, email_verified, created_at, updated_at, last_login
FROM users_v1
WHERE id = %(id)s::bigint

-- Oneself: who calls, as sql/auth.sql has it, and what they are shown.
-- name: me :one
-- index: sessions_user_idx
-- index: users_pkey
SELECT u.id, s.last_used_at < now() - interval '1 minute' AS idle, row_to_json(u)::text AS json
FROM sessions s
JOIN users_v1 u ON u.id = s.user_id
WHERE s.id = %(session_id)s::bigint AND s.user_id = %(user_id)s::bigint AND s.expires_at > now()

-- Of the locks on a user this is the first one taken; the admins' come before it.
-- name: lock :one
-- index: users_pkey
SELECT id, email, name, role, email_verified, password_hash
FROM users
WHERE id = %(id)s::bigint
FOR UPDATE

-- Locks all admins in the order of their ids: if two remove each other, the second sees the change.
-- name: lock_admins :many
-- index: users_admin_idx
SELECT id
FROM users
WHERE role = 'admin'
ORDER BY id
FOR UPDATE

-- name: insert :value
INSERT INTO users (email, name, role, password_hash)
VALUES (%(email)s, %(name)s, %(role)s, %(password_hash)s)
RETURNING id

-- name: update :count
-- index: users_pkey
UPDATE users
SET email = %(email)s, name = %(name)s, role = %(role)s, email_verified = %(email_verified)s,
    updated_at = now()
WHERE id = %(id)s::bigint

-- name: delete :count
-- index: users_pkey
DELETE FROM users
WHERE id = %(id)s::bigint
