-- How many products a category has, kept, so that a list's total is read and not counted.
--
-- The count of a category is the sum of its rows here. A change adds a row and touches none, so no
-- writer ever waits for another; fold_product_counts() makes one row of many, now and then.
CREATE TABLE product_counts (
    category_id bigint,  -- NULL: of no category
    products    bigint NOT NULL
);

CREATE FUNCTION count_products() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO product_counts
    SELECT category_id, CASE tg_op WHEN 'INSERT' THEN count(*) ELSE -count(*) END
    FROM changed
    WHERE retired_at IS NULL
    GROUP BY category_id;
    RETURN NULL;
END $$;
CREATE TRIGGER products_added AFTER INSERT ON products
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION count_products();
CREATE TRIGGER products_removed AFTER DELETE ON products
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION count_products();

-- A sale names neither column, and so does not meet this one.
CREATE FUNCTION count_moved_product() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO product_counts
    SELECT category_id, products
    FROM (VALUES (old.category_id, -1, old.retired_at), (new.category_id, 1, new.retired_at))
         AS v (category_id, products, retired_at)
    WHERE retired_at IS NULL;
    RETURN NULL;
END $$;
CREATE TRIGGER products_moved AFTER UPDATE OF category_id, retired_at ON products FOR EACH ROW
    WHEN ((old.category_id, old.retired_at IS NULL)
          IS DISTINCT FROM (new.category_id, new.retired_at IS NULL))
    EXECUTE FUNCTION count_moved_product();

INSERT INTO product_counts
SELECT category_id, count(*)
FROM products
WHERE retired_at IS NULL
GROUP BY category_id;

CREATE FUNCTION fold_product_counts() RETURNS void LANGUAGE sql AS $$
    WITH old AS (
        DELETE FROM product_counts
        RETURNING category_id, products
    )
    INSERT INTO product_counts
    SELECT category_id, sum(products)
    FROM old
    GROUP BY category_id
    HAVING sum(products) <> 0
$$;

-- What is sold out, in the order in which it is listed. A column of its own, not `stock`: while
-- that stays as it is, a sale touches no index.
ALTER TABLE products ADD COLUMN sold_out boolean NOT NULL GENERATED ALWAYS AS (stock = 0) STORED;
CREATE INDEX products_sold_out_idx ON products (created_at, id)
    WHERE retired_at IS NULL AND sold_out;

-- down
DROP INDEX products_sold_out_idx;
ALTER TABLE products DROP COLUMN sold_out;
DROP FUNCTION fold_product_counts;
DROP TRIGGER products_moved ON products;
DROP TRIGGER products_removed ON products;
DROP TRIGGER products_added ON products;
DROP FUNCTION count_products, count_moved_product;
DROP TABLE product_counts;
