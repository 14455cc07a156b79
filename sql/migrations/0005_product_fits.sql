-- The catalogue's filters, each of which lets everything pass where it is NULL. PostgreSQL puts the
-- expression in place of the call, so that indexes serve it as if it were written out.
CREATE FUNCTION product_fits(
    p products, category bigint, categories bigint[], min_price numeric, max_price numeric,
    in_stock boolean, ids bigint[]
) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (category IS NULL OR p.category_id = category)
       AND (categories IS NULL OR p.category_id = ANY (categories))
       AND (min_price IS NULL OR p.price >= min_price)
       AND (max_price IS NULL OR p.price <= max_price)
       AND (in_stock IS NULL OR p.sold_out = NOT in_stock)
       AND (ids IS NULL OR p.id = ANY (ids))
$$;

-- down
DROP FUNCTION product_fits;
