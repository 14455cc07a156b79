-- A file of products, row by row as text, with the line that each began on.
-- name: stage :count
CREATE TEMPORARY TABLE staged_products (
    line        int NOT NULL,
    sku         text,
    name        text,
    description text,
    price       text,
    stock       text,
    category    text,
    wrong       text  -- why the row can't be split into these columns, or NULL
) ON COMMIT DROP

-- name: analyze :count
ANALYZE staged_products

-- Every rule of the API's schema, and two of the file: a SKU stands in it once, a category exists.
-- name: mistakes :many
SELECT line, reason
FROM (
    SELECT line, unnest(CASE WHEN wrong IS NOT NULL THEN ARRAY[wrong] ELSE ARRAY[
        CASE WHEN coalesce(sku, '') = '' THEN 'sku is missing'
             WHEN length(sku) > 64 OR sku ~ '[\x01-\x1f\x7f]' THEN 'sku is not valid'
             WHEN count(*) OVER (PARTITION BY sku) > 1 THEN 'sku stands in the file twice' END,
        CASE WHEN coalesce(name, '') = '' THEN 'name is missing'
             WHEN length(name) > 200 OR name ~ '[\x01-\x1f\x7f]' THEN 'name is not valid' END,
        CASE WHEN length(description) > 10000 OR description ~ '[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]'
             THEN 'description is not valid' END,
        CASE WHEN coalesce(price, '') = '' THEN 'price is missing'
             WHEN price !~ '^[0-9]{1,10}(\.[0-9]{1,2})?$'
             THEN 'price is not an amount with at most two decimal places' END,
        -- An empty cell might mean nothing left, or nothing to change: the file has to say.
        CASE WHEN stock = '' THEN 'stock is missing'
             WHEN stock !~ '^[0-9]{1,10}$' OR stock::bigint > 2147483647
             THEN 'stock is not a whole number' END,
        CASE WHEN category <> '' AND NOT EXISTS (
             SELECT FROM categories c WHERE lower(c.name) = lower(s.category))
             THEN 'there is no such category' END
    ] END) AS reason
    FROM staged_products s
) found
WHERE reason IS NOT NULL
ORDER BY line, reason

-- Locks existing products in the order of their ids, as in a sale, before `merge` would lock them
-- in the file's order.
-- name: lock :value
SELECT count(*)
FROM (
    SELECT p.id
    FROM products p
    JOIN staged_products s ON s.sku = p.sku
    WHERE p.retired_at IS NULL
    ORDER BY p.id
    FOR NO KEY UPDATE OF p
) locked

-- A column that the file doesn't have stays as it is in a product that exists.
-- name: merge :one
WITH merged AS (
    INSERT INTO products (sku, name, description, price, stock, category_id)
    SELECT s.sku, s.name, coalesce(s.description, ''), s.price::numeric,
           coalesce(s.stock::int, 0), c.id
    FROM staged_products s
    LEFT JOIN categories c ON lower(c.name) = lower(s.category)
    ORDER BY s.line
    ON CONFLICT (sku) WHERE retired_at IS NULL DO UPDATE
    SET name = excluded.name,
        price = excluded.price,
        description = CASE WHEN %(has_description)s THEN excluded.description
                           ELSE products.description END,
        stock = CASE WHEN %(has_stock)s THEN excluded.stock ELSE products.stock END,
        category_id = CASE WHEN %(has_category)s THEN excluded.category_id
                           ELSE products.category_id END,
        updated_at = now()
    RETURNING xmax = 0 AS is_new
)
SELECT count(*) FILTER (WHERE is_new) AS created, count(*) FILTER (WHERE NOT is_new) AS updated
FROM merged

-- A product without a SKU is one that no import could find again.
-- name: export :csv
SELECT p.sku, p.name, p.description, p.price, p.stock, c.name AS category
FROM products p
LEFT JOIN categories c ON c.id = p.category_id
WHERE p.retired_at IS NULL AND p.sku IS NOT NULL
ORDER BY p.id

-- name: nameless :value
SELECT count(*)
FROM products
WHERE retired_at IS NULL AND sku IS NULL

-- name: categories :many
SELECT id
FROM categories
