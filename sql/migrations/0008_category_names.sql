-- The rows of a page are read one by one: a join would build a hash table of categories for each.
CREATE OR REPLACE VIEW products_v1 AS
SELECT p.id, p.sku, p.name, p.description, p.price::text AS price, p.stock, p.category_id,
       (SELECT name FROM categories WHERE id = p.category_id) AS category_name,
       p.created_at, p.updated_at
FROM products p
WHERE p.retired_at IS NULL;

-- down
CREATE OR REPLACE VIEW products_v1 AS
SELECT p.id, p.sku, p.name, p.description, p.price::text AS price, p.stock, p.category_id,
       c.name AS category_name, p.created_at, p.updated_at
FROM products p
LEFT JOIN categories c ON c.id = p.category_id
WHERE p.retired_at IS NULL;
