-- name: list :rows
SELECT c.id, c.name, coalesce(p.products, 0) AS product_count, c.created_at, c.updated_at
FROM categories c
LEFT JOIN (
    SELECT category_id, sum(products)::bigint AS products
    FROM product_counts
    GROUP BY category_id
) p ON p.category_id = c.id
ORDER BY lower(c.name), c.id

-- name: get :json
-- index: categories_pkey
SELECT c.id, c.name,
       (SELECT coalesce(sum(products), 0)::bigint FROM product_counts WHERE category_id = c.id)
           AS product_count,
       c.created_at, c.updated_at
FROM categories c
WHERE c.id = %(id)s::bigint

-- name: lock :value
-- index: categories_pkey
SELECT id
FROM categories
WHERE id = %(id)s::bigint
FOR UPDATE

-- name: insert :value
INSERT INTO categories (name)
VALUES (%(name)s)
RETURNING id

-- name: update :count
-- index: categories_pkey
UPDATE categories
SET name = %(name)s, updated_at = now()
WHERE id = %(id)s::bigint

-- The foreign key refuses while a product belongs to it.
-- name: delete :count
-- index: categories_pkey
DELETE FROM categories
WHERE id = %(id)s::bigint
