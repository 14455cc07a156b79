-- What `flask db check` holds against each other: each query gives the rows that differ, none if all
-- is well.

-- name: counts :many
SELECT coalesce(c.category_id, p.category_id) AS category, coalesce(c.kept, 0) AS kept,
       coalesce(p.counted, 0) AS counted
FROM (
    SELECT category_id, sum(products)::bigint AS kept
    FROM product_counts
    GROUP BY category_id
) c
FULL JOIN (
    SELECT category_id, count(*) AS counted
    FROM products
    WHERE retired_at IS NULL
    GROUP BY category_id
) p ON coalesce(p.category_id, 0) = coalesce(c.category_id, 0)
WHERE coalesce(c.kept, 0) <> coalesce(p.counted, 0)
ORDER BY 1
LIMIT 100

-- A product that a sale names is one that was sold, and can only be retired.
-- name: stock :many
SELECT i.product_id AS product, min(i.transaction_id) AS sale, p.id IS NULL AS missing
FROM transaction_items i
LEFT JOIN products p ON p.id = i.product_id
WHERE p.sold IS NOT true
GROUP BY i.product_id, p.id
ORDER BY 1
LIMIT 100

-- A sale is the sum of its lines, which repeat its buyer, its time and its refund.
-- name: sales :many
SELECT t.id AS sale, t.total, i.amount AS lines, i.differ AS lines_that_differ
FROM transactions t
LEFT JOIN (
    SELECT i.transaction_id, sum(i.amount) AS amount,
           count(*) FILTER (
               WHERE i.user_id IS DISTINCT FROM t.user_id OR i.created_at <> t.created_at
                  OR i.refunded <> (t.refunded_at IS NOT NULL)) AS differ
    FROM transaction_items i
    JOIN transactions t ON t.id = i.transaction_id
    GROUP BY i.transaction_id
) i ON i.transaction_id = t.id
WHERE t.total IS DISTINCT FROM i.amount OR i.differ > 0
ORDER BY 1
LIMIT 100

-- name: days :many
SELECT coalesce(k.day, c.day) AS day, coalesce(k.category_id, c.category_id) AS category,
       k.amount AS kept, c.amount AS counted
FROM sales_days k
FULL JOIN (
    SELECT (created_at AT TIME ZONE 'UTC')::date AS day, category_id,
           count(*) FILTER (WHERE first_in_category AND NOT refunded) AS orders,
           count(*) FILTER (WHERE line = 1 AND NOT refunded) AS sales,
           coalesce(sum(quantity) FILTER (WHERE NOT refunded), 0) AS items,
           coalesce(sum(amount) FILTER (WHERE NOT refunded), 0) AS amount,
           count(*) AS lines, sum(amount) AS line_amount
    FROM transaction_items
    WHERE created_at < (SELECT until::timestamp AT TIME ZONE 'UTC' FROM sales_sealed)
    GROUP BY 1, 2
) c ON c.day = k.day AND coalesce(c.category_id, 0) = coalesce(k.category_id, 0)
WHERE (k.orders, k.sales, k.items, k.amount, k.lines, k.line_amount)
      IS DISTINCT FROM (c.orders, c.sales, c.items, c.amount, c.lines, c.line_amount)
ORDER BY 1, 2
LIMIT 100

-- name: months :many
SELECT coalesce(k.month, c.month) AS month, coalesce(k.product_id, c.product_id) AS product,
       k.amount AS kept, c.amount AS counted
FROM sales_product_months k
FULL JOIN (
    SELECT date_trunc('month', created_at AT TIME ZONE 'UTC')::date AS month, product_id,
           count(*) FILTER (WHERE NOT refunded) AS orders,
           count(*) FILTER (WHERE line = 1 AND NOT refunded) AS sales,
           coalesce(sum(quantity) FILTER (WHERE NOT refunded), 0) AS items,
           coalesce(sum(amount) FILTER (WHERE NOT refunded), 0) AS amount
    FROM transaction_items
    WHERE created_at < (
        SELECT date_trunc('month', until::timestamp) AT TIME ZONE 'UTC' FROM sales_sealed)
    GROUP BY 1, 2
) c ON c.month = k.month AND c.product_id = k.product_id
WHERE (k.orders, k.sales, k.items, k.amount)
      IS DISTINCT FROM (c.orders, c.sales, c.items, c.amount)
ORDER BY 1, 2
LIMIT 100
