-- A product as version 1 shows it.
CREATE VIEW products_v1 AS
SELECT p.id, p.sku, p.name, p.description, p.price::text AS price, p.stock, p.category_id,
       c.name AS category_name, p.created_at, p.updated_at
FROM products p
LEFT JOIN categories c ON c.id = p.category_id
WHERE p.retired_at IS NULL;

-- down
DROP VIEW products_v1;
