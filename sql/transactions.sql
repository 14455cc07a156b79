-- name: page :rows replan
SELECT t.id, t.user_id, t.status, t.total, t.items, t.created_at, t.refunded_at
FROM transactions_v1 t
WHERE (%(user_id)s::bigint IS NULL OR t.user_id = %(user_id)s)
  AND (%(status)s::text IS NULL OR (t.refunded_at IS NULL) = (%(status)s = 'completed'))
  AND (%(start)s::timestamptz IS NULL OR t.created_at >= %(start)s)
  AND (%(end)s::timestamptz IS NULL OR t.created_at < %(end)s)
  AND (%(after_id)s::bigint IS NULL
       OR (t.created_at, t.id) < (%(after)s::text::timestamptz, %(after_id)s))
ORDER BY t.created_at DESC, t.id DESC
LIMIT %(limit)s::bigint OFFSET %(offset)s::bigint

-- name: count :value replan
SELECT count(*)
FROM transactions t
WHERE (%(user_id)s::bigint IS NULL OR t.user_id = %(user_id)s)
  AND (%(status)s::text IS NULL OR (t.refunded_at IS NULL) = (%(status)s = 'completed'))
  AND (%(start)s::timestamptz IS NULL OR t.created_at >= %(start)s)
  AND (%(end)s::timestamptz IS NULL OR t.created_at < %(end)s)

-- A user's own sale, or with no user given anybody's.
-- name: get :json
-- index: transactions_pkey
-- index: transaction_items_pkey
SELECT t.id, t.user_id, t.status, t.total, t.items, t.created_at, t.refunded_at
FROM transactions_v1 t
WHERE t.id = %(id)s::bigint AND (%(user_id)s::bigint IS NULL OR t.user_id = %(user_id)s)

-- The whole sale in one statement. To prevent deadlocks, the buyer is locked before the products
-- (deleting a user also locks the user before the sales), and the products in the order of their
-- ids. Stock is taken only if there is enough of every product; names and prices are those of the
-- locked rows. Returns one row: the sale as JSON, or the products that prevented it.
-- name: sell :one
-- index: products_pkey
WITH wanted AS (
    SELECT product_id, quantity, line
    FROM unnest(%(product_ids)s::bigint[], %(quantities)s::int[])
         WITH ORDINALITY AS w (product_id, quantity, line)
), buyer AS MATERIALIZED (
    SELECT id
    FROM users
    WHERE id = %(user_id)s::bigint
    FOR KEY SHARE
), locked AS MATERIALIZED (
    SELECT p.id, p.name, p.price, p.stock, p.category_id, w.quantity, w.line
    FROM products p
    JOIN wanted w ON w.product_id = p.id
    WHERE p.retired_at IS NULL
      -- Always true: it runs `buyer` first. The foreign key refuses a deleted buyer.
      AND (SELECT count(*) FROM buyer) >= 0
    ORDER BY p.id
    FOR NO KEY UPDATE OF p
), verdict AS (
    SELECT coalesce(array_agg(w.product_id ORDER BY w.line) FILTER (WHERE l.id IS NULL), '{}')
               AS unknown,
           coalesce(array_agg(w.product_id ORDER BY w.line) FILTER (WHERE l.stock < w.quantity),
                    '{}') AS short
    FROM wanted w
    LEFT JOIN locked l ON l.id = w.product_id
), taken AS (
    UPDATE products p
    SET stock = p.stock - l.quantity, sold = true, updated_at = now()
    FROM locked l, verdict v
    WHERE p.id = l.id AND v.unknown = '{}' AND v.short = '{}'
    RETURNING p.id
), sale AS (
    INSERT INTO transactions (user_id, total)
    SELECT %(user_id)s::bigint, sum(l.price * l.quantity)
    FROM locked l, verdict v
    WHERE v.unknown = '{}' AND v.short = '{}'
    HAVING count(*) > 0
    RETURNING id, user_id, total, created_at, refunded_at
), sold AS (
    INSERT INTO transaction_items (transaction_id, line, quantity, product_id, user_id,
        category_id, created_at, unit_price, amount, first_in_category, product_name,
        category_name)
    SELECT s.id, l.line, l.quantity, l.id, s.user_id, l.category_id, s.created_at, l.price,
           l.price * l.quantity,
           row_number() OVER (PARTITION BY l.category_id ORDER BY l.line) = 1,
           l.name, c.name
    FROM sale s
    CROSS JOIN locked l
    LEFT JOIN categories c ON c.id = l.category_id
    RETURNING line, product_id, product_name, quantity, unit_price, amount
)
SELECT v.unknown, v.short, s.id,
       CASE WHEN s.id IS NOT NULL THEN row_to_json((
           SELECT r
           FROM (SELECT s.id, s.user_id, 'completed' AS status, s.total::text AS total,
                        (SELECT json_agg(json_build_object(
                             'product_id', product_id, 'name', product_name,
                             'quantity', quantity, 'unit_price', unit_price::text,
                             'amount', amount::text) ORDER BY line)
                         FROM sold) AS items,
                        s.created_at, s.refunded_at) r
       ))::text END AS json,
       (SELECT array_agg(DISTINCT category_id) FROM locked) AS categories,
       (SELECT count(*) FROM taken) AS taken
FROM verdict v
LEFT JOIN sale s ON true

-- The sale, and what it gives back, if it was not refunded before. Products are locked in the
-- order of their ids, as in a sale.
-- name: refund :one
-- index: transactions_pkey
-- index: transaction_items_pkey
WITH refunded AS (
    UPDATE transactions
    SET refunded_at = now()
    WHERE id = %(id)s::bigint AND refunded_at IS NULL
    RETURNING id
), lines AS (
    UPDATE transaction_items i
    SET refunded = true
    FROM refunded r
    WHERE i.transaction_id = r.id
    RETURNING i.product_id, i.quantity
), locked AS MATERIALIZED (
    SELECT p.id, p.category_id, l.quantity
    FROM products p
    JOIN lines l ON l.product_id = p.id
    ORDER BY p.id
    FOR NO KEY UPDATE OF p
), returned AS (
    UPDATE products p
    SET stock = p.stock + k.quantity, updated_at = now()
    FROM locked k
    WHERE p.id = k.id
    RETURNING p.id
)
SELECT (SELECT count(*) FROM refunded) AS refunded,
       (SELECT array_agg(id) FROM returned) AS products,
       (SELECT array_agg(DISTINCT category_id) FROM locked) AS categories
