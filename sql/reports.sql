-- The rows and the amount of a window, for Report-Rows and Report-Amount. Whole sealed days come
-- from sales_days; the rest of the window, before and after them, is counted.
-- name: size :one replan
-- index: transaction_items_created_idx
WITH span AS (
    SELECT first, greatest(first, last) AS last
    FROM (
        SELECT ((%(start_date)s::timestamptz + interval '1 day' - interval '1 microsecond')
                   AT TIME ZONE 'UTC')::date AS first,
               least((%(end_date)s::timestamptz AT TIME ZONE 'UTC')::date, until) AS last
        FROM sales_sealed
    ) s
)
SELECT sum(rows)::bigint AS rows, sum(amount)::numeric(20, 2)::text AS amount
FROM (
    SELECT coalesce(sum(lines), 0) AS rows, coalesce(sum(line_amount), 0) AS amount
    FROM sales_days, span
    WHERE day >= first AND day < last
    UNION ALL
    SELECT count(*), coalesce(sum(amount), 0)
    FROM transaction_items
    WHERE created_at >= %(start_date)s::timestamptz
      AND created_at < least(%(end_date)s::timestamptz,
                             (SELECT first::timestamp AT TIME ZONE 'UTC' FROM span))
    UNION ALL
    SELECT count(*), coalesce(sum(amount), 0)
    FROM transaction_items
    WHERE created_at >= greatest(%(start_date)s::timestamptz,
                                 (SELECT last::timestamp AT TIME ZONE 'UTC' FROM span))
      AND created_at < %(end_date)s::timestamptz
      AND (SELECT first::timestamp AT TIME ZONE 'UTC' FROM span) <= %(end_date)s::timestamptz
) parts

-- name: json_lines :ndjson
-- index: transaction_items_created_idx
SELECT transaction_id, created_at,
       CASE WHEN refunded THEN 'refunded' ELSE 'completed' END AS status,
       user_id, product_id, product_name, quantity, unit_price::text AS unit_price,
       amount::text AS amount
FROM transaction_items
WHERE created_at >= %(start_date)s::timestamptz AND created_at < %(end_date)s::timestamptz
ORDER BY created_at, transaction_id, line

-- A cell that begins like a formula, with one of = + - @ or a control character, gets an apostrophe
-- in front (OWASP, CSV Injection). The time is ISO 8601 out of PostgreSQL's own form; the order is the
-- column's, not the text's.
-- name: csv_lines :csv
-- index: transaction_items_created_idx
SELECT transaction_id, replace(created_at::text, ' ', 'T') || ':00' AS created_at,
       CASE WHEN refunded THEN 'refunded' ELSE 'completed' END AS status,
       user_id, product_id,
       CASE WHEN ascii(product_name) IN (61, 43, 45, 64, 9, 13) THEN '''' || product_name
            ELSE product_name END AS product_name,
       quantity, unit_price, amount
FROM transaction_items i
WHERE created_at >= %(start_date)s::timestamptz AND created_at < %(end_date)s::timestamptz
ORDER BY i.created_at, transaction_id, line

-- Sums by day, week, month or category: whole sealed days from sales_days, the rest of the window
-- from the lines. An order counts once per group: in a time group by its first line, in a category
-- by its first line of that category.
-- name: sales :value replan
-- index: transaction_items_created_idx
WITH span AS (
    SELECT first, greatest(first, last) AS last, first::timestamp AT TIME ZONE 'UTC' AS first_at,
           greatest(first, last)::timestamp AT TIME ZONE 'UTC' AS last_at
    FROM (
        SELECT ((%(start_date)s::timestamptz + interval '1 day' - interval '1 microsecond')
                   AT TIME ZONE 'UTC')::date AS first,
               least((%(end_date)s::timestamptz AT TIME ZONE 'UTC')::date, until) AS last
        FROM sales_sealed
    ) s
), rest AS (
    SELECT created_at, line, category_id, category_name, first_in_category, quantity, amount
    FROM transaction_items
    WHERE created_at >= %(start_date)s::timestamptz
      AND created_at < least(%(end_date)s::timestamptz, (SELECT first_at FROM span))
      AND NOT refunded
    UNION ALL
    SELECT created_at, line, category_id, category_name, first_in_category, quantity, amount
    FROM transaction_items
    WHERE created_at >= greatest(%(start_date)s::timestamptz, (SELECT last_at FROM span))
      AND created_at < %(end_date)s::timestamptz
      AND (SELECT first_at FROM span) <= %(end_date)s::timestamptz
      AND NOT refunded
), parts AS (
    SELECT day, category_id, category_name, orders, sales, items, amount
    FROM sales_days, span
    WHERE day >= first AND day < last
    UNION ALL
    SELECT (created_at AT TIME ZONE 'UTC')::date, category_id, max(category_name),
           count(*) FILTER (WHERE first_in_category), count(*) FILTER (WHERE line = 1),
           sum(quantity), sum(amount)
    FROM rest
    GROUP BY 1, 2
), groups AS (
    SELECT key, coalesce(max(label), key) AS label,
           sum(CASE WHEN %(group_by)s::text = 'category' THEN orders ELSE sales END) AS orders,
           sum(items) AS items, sum(amount) AS amount, sum(sales) AS sales
    FROM (
        SELECT CASE %(group_by)s::text
                   WHEN 'day' THEN to_char(day, 'YYYY-MM-DD')
                   WHEN 'week' THEN to_char(day, 'IYYY-"W"IW')
                   WHEN 'month' THEN to_char(day, 'YYYY-MM')
                   ELSE category_id::text
               END AS key,
               CASE WHEN %(group_by)s::text = 'category' THEN category_name END AS label,
               orders, sales, items, amount
        FROM parts
    ) p
    GROUP BY key
    HAVING sum(items) > 0
)
SELECT json_build_object(
    'data', coalesce(json_agg(json_build_object(
        'key', key, 'label', label, 'orders', orders, 'items', items,
        'amount', amount::numeric(20, 2)::text)
        ORDER BY CASE WHEN %(group_by)s::text = 'category' THEN -amount END, key), '[]'),
    'total', json_build_object(
        'orders', coalesce(sum(sales), 0), 'items', coalesce(sum(items), 0),
        'amount', coalesce(sum(amount), 0)::numeric(20, 2)::text)
)::text
FROM groups

-- The same by product: whole sealed months from sales_product_months.
-- name: sales_by_product :value replan
-- index: transaction_items_created_idx
WITH span AS (
    SELECT first, greatest(first, last) AS last, first::timestamp AT TIME ZONE 'UTC' AS first_at,
           greatest(first, last)::timestamp AT TIME ZONE 'UTC' AS last_at
    FROM (
        SELECT date_trunc('month', (%(start_date)s::timestamptz AT TIME ZONE 'UTC')
                   + interval '1 month' - interval '1 microsecond')::date AS first,
               date_trunc('month', least(%(end_date)s::timestamptz AT TIME ZONE 'UTC',
                                         until::timestamp))::date AS last
        FROM sales_sealed
    ) s
), rest AS (
    SELECT product_id, product_name, line, quantity, amount
    FROM transaction_items
    WHERE created_at >= %(start_date)s::timestamptz
      AND created_at < least(%(end_date)s::timestamptz, (SELECT first_at FROM span))
      AND NOT refunded
    UNION ALL
    SELECT product_id, product_name, line, quantity, amount
    FROM transaction_items
    WHERE created_at >= greatest(%(start_date)s::timestamptz, (SELECT last_at FROM span))
      AND created_at < %(end_date)s::timestamptz
      AND (SELECT first_at FROM span) <= %(end_date)s::timestamptz
      AND NOT refunded
), groups AS (
    SELECT product_id, max(product_name) AS label, sum(orders) AS orders, sum(items) AS items,
           sum(amount) AS amount, sum(sales) AS sales
    FROM (
        SELECT product_id, product_name, orders, sales, items, amount
        FROM sales_product_months, span
        WHERE month >= first AND month < last
        UNION ALL
        SELECT product_id, max(product_name), count(*), count(*) FILTER (WHERE line = 1),
               sum(quantity), sum(amount)
        FROM rest
        GROUP BY product_id
    ) parts
    GROUP BY product_id
    HAVING sum(items) > 0
)
SELECT json_build_object(
    'data', coalesce(json_agg(json_build_object(
        'key', product_id::text, 'label', label, 'orders', orders, 'items', items,
        'amount', amount::numeric(20, 2)::text)
        ORDER BY amount DESC, product_id), '[]'),
    'total', json_build_object(
        'orders', coalesce(sum(sales), 0), 'items', coalesce(sum(items), 0),
        'amount', coalesce(sum(amount), 0)::numeric(20, 2)::text)
)::text
FROM groups
