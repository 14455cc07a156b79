-- name: page :rows replan
SELECT u.id, u.email, u.role, json_build_object('name', u.name) AS profile, u.email_verified,
       u.created_at, u.updated_at, u.last_login AS last_login_at
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
LIMIT %(limit)s::bigint

-- name: get :json
-- index: users_pkey
SELECT id, email, role, profile, email_verified, created_at, updated_at, last_login_at
FROM users_v2
WHERE id = %(id)s::bigint

-- Oneself: who calls, as sql/auth.sql has it, and what they are shown.
-- name: me :one
-- index: sessions_user_idx
-- index: users_pkey
SELECT u.id, s.last_used_at < now() - interval '1 minute' AS idle, row_to_json(u)::text AS json
FROM sessions s
JOIN users_v2 u ON u.id = s.user_id
WHERE s.id = %(session_id)s::bigint AND s.user_id = %(user_id)s::bigint AND s.expires_at > now()
