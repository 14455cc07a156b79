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
