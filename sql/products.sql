-- The ids are found by an index-only scan, where the filters allow it, and only the page's own
-- rows are read: this makes distant pages cheaper. A subquery per row keeps their order.
-- name: page :column replan
SELECT (SELECT row_to_json(v)::text FROM products_v1 v WHERE v.id = k.id)
FROM (
    SELECT p.id
    FROM products p
    WHERE p.retired_at IS NULL
      AND product_fits(p, %(category)s::bigint, %(categories)s::bigint[],
                       %(min_price)s::numeric, %(max_price)s::numeric,
                       %(in_stock)s::boolean, %(ids)s::bigint[])
      AND (%(pattern)s::text IS NULL OR p.search_text LIKE '%' || lower(%(pattern)s) || '%')
      AND (%(after_id)s::bigint IS NULL OR CASE %(sort)s::text
           WHEN 'created_at'
           THEN (p.created_at, p.id) > (%(after)s::text::timestamptz, %(after_id)s)
           WHEN '-created_at'
           THEN (p.created_at, p.id) < (%(after)s::text::timestamptz, %(after_id)s)
           WHEN 'name'
           THEN (lower(p.name) COLLATE "C", p.id) > (lower(%(after)s::text), %(after_id)s)
           WHEN '-name'
           THEN (lower(p.name) COLLATE "C", p.id) < (lower(%(after)s::text), %(after_id)s)
           WHEN 'price'
           THEN (p.price, p.id) > (%(after)s::text::numeric, %(after_id)s)
           WHEN '-price'
           THEN (p.price, p.id) < (%(after)s::text::numeric, %(after_id)s)
           END)
    ORDER BY
        CASE WHEN %(sort)s = 'created_at' THEN p.created_at END,
        CASE WHEN %(sort)s = '-created_at' THEN p.created_at END DESC,
        CASE WHEN %(sort)s = 'name' THEN lower(p.name) COLLATE "C" END,
        CASE WHEN %(sort)s = '-name' THEN lower(p.name) COLLATE "C" END DESC,
        CASE WHEN %(sort)s = 'price' THEN p.price END,
        CASE WHEN %(sort)s = '-price' THEN p.price END DESC,
        CASE WHEN left(%(sort)s, 1) = '-' THEN p.id END DESC,
        p.id
    LIMIT %(limit)s::bigint OFFSET %(offset)s::bigint
) k

-- `page` without optional filters, and its total. It is prepared: to parse and plan `page` takes
-- longer than to find the rows. Past the end, LIMIT 0 avoids the scan.
-- name: newest :many
-- index: products_category_created_idx
WITH kept AS MATERIALIZED (
    SELECT coalesce(sum(products), 0)::bigint AS total
    FROM product_counts
    WHERE category_id = %(category)s::bigint
)
SELECT (SELECT total FROM kept) AS total,
       (SELECT row_to_json(v)::text FROM products_v1 v WHERE v.id = k.id) AS json
FROM (
    SELECT p.id
    FROM products p
    WHERE p.retired_at IS NULL AND p.category_id = %(category)s::bigint
    ORDER BY p.created_at DESC, p.id DESC
    LIMIT (SELECT CASE WHEN total > %(offset)s::bigint THEN %(limit)s::bigint ELSE 0 END FROM kept)
    OFFSET %(offset)s::bigint
) k

-- Relevance is three lists, one after the other: names that begin with the term, in alphabetical
-- order, so that an exact match comes first; names that contain it elsewhere, newest first; and
-- products with it only in description or SKU, newest first. (For terms of one or two letters,
-- which no trigram index supports, the third list includes the second.) There is no outer ORDER
-- BY: PostgreSQL reads the parts of a UNION ALL in turn and stops at the limit, so that a very
-- common word costs no more than the page. `after_rank` and `after_name` come from a cursor.
-- name: relevant :many replan
SELECT k.rank, (SELECT row_to_json(v)::text FROM products_v1 v WHERE v.id = k.id) AS json
FROM (
    (SELECT 1 AS rank, p.id
     FROM products p
     WHERE p.retired_at IS NULL
       AND product_fits(p, %(category)s::bigint, %(categories)s::bigint[],
                        %(min_price)s::numeric, %(max_price)s::numeric,
                        %(in_stock)s::boolean, %(ids)s::bigint[])
       AND lower(p.name) COLLATE "C" LIKE lower(%(pattern)s::text) || '%'
       AND (%(after_rank)s::int IS NULL OR (%(after_rank)s = 1
            AND (lower(p.name) COLLATE "C", p.id) > (lower(%(after_name)s::text), %(after_id)s)))
     ORDER BY lower(p.name) COLLATE "C", p.id
     LIMIT %(limit)s::bigint + %(offset)s::bigint)
    UNION ALL
    (SELECT 2 AS rank, p.id
     FROM products p
     WHERE p.retired_at IS NULL
       AND product_fits(p, %(category)s::bigint, %(categories)s::bigint[],
                        %(min_price)s::numeric, %(max_price)s::numeric,
                        %(in_stock)s::boolean, %(ids)s::bigint[])
       AND length(%(search)s::text) > 2
       AND lower(p.name) LIKE '%' || lower(%(pattern)s::text) || '%'
       AND p.search_text LIKE '%' || lower(%(pattern)s::text) || '%'  -- says how rare it is
       AND lower(p.name) NOT LIKE lower(%(pattern)s::text) || '%'
       AND (%(after_rank)s::int IS NULL OR %(after_rank)s < 2
            OR (%(after_rank)s = 2 AND p.id < %(after_id)s::bigint))
     ORDER BY p.id DESC
     LIMIT %(limit)s::bigint + %(offset)s::bigint)
    UNION ALL
    (SELECT 3 AS rank, p.id
     FROM products p
     WHERE p.retired_at IS NULL
       AND product_fits(p, %(category)s::bigint, %(categories)s::bigint[],
                        %(min_price)s::numeric, %(max_price)s::numeric,
                        %(in_stock)s::boolean, %(ids)s::bigint[])
       AND p.search_text LIKE '%' || lower(%(pattern)s::text) || '%'
       AND CASE WHEN length(%(search)s::text) > 2
           THEN lower(p.name) NOT LIKE '%' || lower(%(pattern)s::text) || '%'
           ELSE lower(p.name) NOT LIKE lower(%(pattern)s::text) || '%' END
       AND (%(after_rank)s::int IS NULL OR %(after_rank)s < 3 OR p.id < %(after_id)s::bigint)
     ORDER BY p.id DESC
     LIMIT %(limit)s::bigint + %(offset)s::bigint)
    LIMIT %(limit)s::bigint OFFSET %(offset)s::bigint
) k

-- How many products contain a term, up to 501: then it is common, and a scan in order finds enough
-- soon. Also the id and rank of those that pass the filters, most relevant first, as above.
-- Terms of one or two letters use short_grams(): no trigram index supports them.
-- name: matches :one replan
-- index: products_grams_idx
SELECT count(*) AS found,
       coalesce(array_agg(ARRAY[k.id, k.rank]
                          ORDER BY k.rank, CASE WHEN k.rank = 1 THEN k.name END COLLATE "C",
                                   CASE WHEN k.rank > 1 THEN -k.id END, k.id)
                FILTER (WHERE k.fits), '{}') AS ranked
FROM (
    SELECT (m.p).id, lower((m.p).name) AS name,
           product_fits(m.p, %(category)s::bigint, %(categories)s::bigint[],
                        %(min_price)s::numeric, %(max_price)s::numeric,
                        %(in_stock)s::boolean, NULL) AS fits,
           CASE WHEN lower((m.p).name) LIKE lower(%(pattern)s::text) || '%' THEN 1
                WHEN length(%(search)s::text) > 2
                     AND lower((m.p).name) LIKE '%' || lower(%(pattern)s::text) || '%' THEN 2
                ELSE 3 END AS rank
    FROM (
        (SELECT p
         FROM products p
         WHERE p.retired_at IS NULL AND length(%(search)s::text) > 2
           AND p.search_text LIKE '%' || lower(%(pattern)s::text) || '%'
         LIMIT 501)
        UNION ALL
        (SELECT p
         FROM products p
         WHERE p.retired_at IS NULL AND length(%(search)s::text) < 3
           AND short_grams(p.search_text) @> ARRAY[lower(%(search)s::text)]
         LIMIT 501)
    ) m
) k

-- name: listed :column
-- index: products_pkey
SELECT (SELECT row_to_json(v)::text FROM products_v1 v WHERE v.id = k.id)
FROM unnest(%(ids)s::bigint[]) WITH ORDINALITY k (id, place)
ORDER BY k.place

-- name: total :value
SELECT coalesce(sum(products), 0)::bigint
FROM product_counts

-- name: total_of :value
SELECT coalesce(sum(products), 0)::bigint
FROM product_counts
WHERE category_id = ANY (%(categories)s::bigint[])

-- name: count :value replan
SELECT count(*)
FROM products p
WHERE p.retired_at IS NULL
  AND product_fits(p, %(category)s::bigint, %(categories)s::bigint[],
                   %(min_price)s::numeric, %(max_price)s::numeric,
                   %(in_stock)s::boolean, %(ids)s::bigint[])
  AND (%(pattern)s::text IS NULL OR p.search_text LIKE '%' || lower(%(pattern)s) || '%')

-- name: get :json
-- index: products_pkey
SELECT id, sku, name, description, price, stock, category_id, category_name, created_at, updated_at
FROM products_v1
WHERE id = %(id)s::bigint

-- name: lock :one
-- index: products_pkey
SELECT id, sku, name, description, price, stock, category_id, sold
FROM products
WHERE id = %(id)s::bigint AND retired_at IS NULL
FOR UPDATE

-- name: insert :value
INSERT INTO products (sku, name, description, price, stock, category_id)
VALUES (%(sku)s, %(name)s, %(description)s, %(price)s, %(stock)s, %(category_id)s)
RETURNING id

-- name: update :count
-- index: products_pkey
UPDATE products
SET sku = %(sku)s, name = %(name)s, description = %(description)s, price = %(price)s,
    stock = %(stock)s, category_id = %(category_id)s, updated_at = now()
WHERE id = %(id)s::bigint

-- name: delete :count
-- index: products_pkey
DELETE FROM products
WHERE id = %(id)s::bigint

-- Out of the catalogue, and out of its category, which may now be deleted.
-- name: retire :count
-- index: products_pkey
UPDATE products
SET retired_at = now(), updated_at = now(), category_id = NULL
WHERE id = %(id)s::bigint
