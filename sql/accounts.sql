-- What `flask users` does beyond the API.

-- name: list :many
SELECT id, email, name, role, email_verified, created_at, last_login
FROM users
WHERE (%(role)s::text IS NULL OR role = %(role)s)
ORDER BY id
LIMIT %(limit)s

-- name: find :value
SELECT id
FROM users
WHERE email = %(email)s

-- name: insert :value
INSERT INTO users (email, name, role, password_hash, email_verified)
VALUES (%(email)s, %(name)s, %(role)s, %(password_hash)s, true)
RETURNING id

-- name: set_role :count
UPDATE users
SET role = %(role)s, updated_at = now()
WHERE id = %(id)s

-- name: set_password :count
UPDATE users
SET password_hash = %(password_hash)s, updated_at = now()
WHERE id = %(id)s

-- name: sessions :many
SELECT id, created_at, last_used_at, expires_at, address, user_agent
FROM sessions
WHERE user_id = %(id)s AND expires_at > now()
ORDER BY last_used_at DESC, id DESC
