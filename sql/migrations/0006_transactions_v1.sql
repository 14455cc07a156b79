-- A sale as version 1 shows it.
CREATE VIEW transactions_v1 AS
SELECT t.id, t.user_id,
       CASE WHEN t.refunded_at IS NULL THEN 'completed' ELSE 'refunded' END AS status,
       t.total::text AS total, i.items, t.created_at, t.refunded_at
FROM transactions t
CROSS JOIN LATERAL (
    SELECT json_agg(json_build_object(
        'product_id', product_id, 'name', product_name, 'quantity', quantity,
        'unit_price', unit_price::text, 'amount', amount::text) ORDER BY line) AS items
    FROM transaction_items
    WHERE transaction_id = t.id
) i;

-- down
DROP VIEW transactions_v1;
