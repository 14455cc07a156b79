-- A product as version 1 shows it. A subquery for the category's name costs half of what a join
-- costs, where the rows of a page are read one by one.
CREATE VIEW products_v1 AS
SELECT p.id, p.sku, p.name, p.description, p.price::text AS price, p.stock, p.category_id,
       (SELECT name FROM categories WHERE id = p.category_id) AS category_name,
       p.created_at, p.updated_at
FROM products p
WHERE p.retired_at IS NULL;

-- down
DROP VIEW products_v1;
