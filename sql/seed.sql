-- A demo shop of any size, made set-wise. Everything random is a hash of the row's number, so that
-- two runs make the same shop.

-- name: empty :value
SELECT NOT EXISTS (SELECT FROM users) AND NOT EXISTS (SELECT FROM products)

-- name: categories :count
INSERT INTO categories (name)
SELECT name
FROM unnest(ARRAY[
    'Coffee & Tea', 'Kitchen', 'Tableware', 'Bedroom', 'Bathroom', 'Lighting', 'Garden', 'Tools',
    'Stationery', 'Books', 'Toys & Games', 'Outdoor', 'Cycling', 'Running', 'Bags', 'Audio',
    'Computing', 'Pets', 'Baby', 'Pantry'
]) WITH ORDINALITY AS c (name, n)
ORDER BY n

-- The admin, with number 0, and as many users as asked for.
-- name: users :count
INSERT INTO users (email, name, role, password_hash, email_verified, created_at)
SELECT CASE i WHEN 0 THEN 'admin@example.com' ELSE 'user' || i || '@example.com' END,
       CASE i WHEN 0 THEN 'Alex Admin' ELSE
           (ARRAY['Ada', 'Ben', 'Chloe', 'David', 'Elena', 'Farid', 'Grace', 'Hugo', 'Ines', 'Jonas',
                  'Keiko', 'Liam', 'Maya', 'Noah', 'Olga', 'Pablo', 'Quinn', 'Rosa', 'Samir', 'Tess'
           ])[1 + (hashint8extended(i, 1) & 1048575) % 20] || ' ' ||
           (ARRAY['Abbott', 'Baker', 'Castro', 'Dubois', 'Evans', 'Fischer', 'Garcia', 'Haas',
                  'Ito', 'Jensen', 'Kaya', 'Lopez', 'Meyer', 'Novak', 'Okafor', 'Patel', 'Rossi',
                  'Silva', 'Tanaka', 'Weber'])[1 + (hashint8extended(i, 2) & 1048575) % 20]
       END,
       CASE i WHEN 0 THEN 'admin' ELSE 'user' END, %(password_hash)s, true,
       now() - interval '400 days'
           + (hashint8extended(i, 3) & 1048575) / 1048576.0 * interval '30 days'
FROM generate_series(%(first)s::bigint, %(last)s::bigint) i
ORDER BY i

-- name: products :count
WITH words AS (
    SELECT ARRAY['Classic', 'Compact', 'Everyday', 'Handmade', 'Heritage', 'Large', 'Light',
                 'Mini', 'Nordic', 'Organic', 'Premium', 'Quiet', 'Recycled', 'Slim', 'Soft',
                 'Studio', 'Sturdy', 'Travel', 'Urban', 'Vintage'] AS styles,
           ARRAY['Ash', 'Bamboo', 'Brass', 'Canvas', 'Ceramic', 'Copper', 'Cork', 'Cotton', 'Felt',
                 'Glass', 'Leather', 'Linen', 'Oak', 'Steel', 'Walnut', 'Wool'] AS materials
), kinds (category, code, nouns) AS (
    VALUES
    (1, 'COF', ARRAY['Espresso Cup', 'French Press', 'Coffee Grinder', 'Tea Kettle', 'Teapot']),
    (2, 'KIT', ARRAY['Chef''s Knife', 'Cutting Board', 'Frying Pan', 'Mixing Bowl', 'Saucepan']),
    (3, 'TAB', ARRAY['Dinner Plate', 'Soup Bowl', 'Water Glass', 'Serving Tray', 'Salad Servers']),
    (4, 'BED', ARRAY['Duvet Cover', 'Pillow', 'Bedside Table', 'Blanket', 'Alarm Clock']),
    (5, 'BAT', ARRAY['Bath Towel', 'Soap Dish', 'Shower Caddy', 'Bath Mat', 'Mirror']),
    (6, 'LIG', ARRAY['Desk Lamp', 'Floor Lamp', 'Pendant Light', 'Night Light', 'Lantern']),
    (7, 'GAR', ARRAY['Plant Pot', 'Watering Can', 'Hand Trowel', 'Bird Feeder', 'Pruning Shears']),
    (8, 'TOO', ARRAY['Claw Hammer', 'Screwdriver Set', 'Tape Measure', 'Tool Box', 'Hand Saw']),
    (9, 'STA', ARRAY['Notebook', 'Fountain Pen', 'Pencil Case', 'Desk Organiser', 'Letter Set']),
    (10, 'BOO', ARRAY['Cookbook', 'Atlas', 'Field Guide', 'Sketchbook', 'Travel Journal']),
    (11, 'TOY', ARRAY['Building Blocks', 'Chess Set', 'Jigsaw Puzzle', 'Kite', 'Spinning Top']),
    (12, 'OUT', ARRAY['Tent', 'Sleeping Bag', 'Camp Stove', 'Water Bottle', 'Hammock']),
    (13, 'CYC', ARRAY['Bike Light', 'Helmet', 'Pannier', 'Floor Pump', 'Bell']),
    (14, 'RUN', ARRAY['Running Shirt', 'Trail Shoes', 'Waist Pack', 'Cap', 'Running Socks']),
    (15, 'BAG', ARRAY['Backpack', 'Tote Bag', 'Weekender', 'Wallet', 'Laptop Sleeve']),
    (16, 'AUD', ARRAY['Headphones', 'Bookshelf Speaker', 'Turntable', 'Radio', 'Microphone']),
    (17, 'COM', ARRAY['Keyboard', 'Mouse', 'Monitor Stand', 'USB Hub', 'Webcam']),
    (18, 'PET', ARRAY['Dog Bed', 'Cat Tree', 'Feeding Bowl', 'Leash', 'Chew Toy']),
    (19, 'BAB', ARRAY['Baby Blanket', 'Rattle', 'High Chair', 'Bib', 'Changing Mat']),
    (20, 'PAN', ARRAY['Olive Oil', 'Sea Salt', 'Honey', 'Pasta', 'Dark Chocolate'])
), numbered AS (
    SELECT i, 1 + (i - 1) % 20 AS category, hashint8extended(i, 4) & 1048575 AS a,
           hashint8extended(i, 5) & 1048575 AS b, hashint8extended(i, 6) & 1048575 AS c,
           hashint8extended(i, 7) & 1048575 AS d, hashint8extended(i, 8) & 1048575 AS e
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) i
)
INSERT INTO products (sku, name, description, price, stock, category_id, created_at, updated_at)
SELECT k.code || '-' || upper(lpad(to_hex(n.i), 6, '0')),
       styles[1 + a % 20] || ' ' || materials[1 + b % 16] || ' ' || nouns[1 + c % 5],
       'This ' || lower(nouns[1 + c % 5]) || ' of ' || lower(materials[1 + b % 16])
           || ' is made to be used every day. '
           || (ARRAY['Ships in two days.', 'Made in small batches.', 'Two years of guarantee.',
                     'A favourite of our customers.', 'Now with better packaging.'])[1 + d % 5],
       round((1 + (d % 300) * (e % 7 + 1) * 0.25)::numeric, 0) + 0.90 + (e % 10) * 0.01,
       20 + e % 200, n.category,
       %(now)s::timestamptz - n.i * (interval '365 days' / greatest(%(total)s::bigint, 1)),
       %(now)s::timestamptz - n.i * (interval '365 days' / greatest(%(total)s::bigint, 1))
FROM numbered n
CROSS JOIN words
JOIN kinds k ON k.category = n.category
ORDER BY n.i

-- name: sales :count
WITH sizes AS (
    SELECT (SELECT min(id) FROM users) AS first_user, (SELECT count(*) FROM users) AS users,
           (SELECT min(id) FROM products) AS first_product, (SELECT count(*) FROM products) AS products
), picked AS (
    -- Two lines may pick one product; the later gives way.
    SELECT DISTINCT ON (s, p.id) s, l, p.id AS product_id, p.name, p.price, p.category_id,
           c.name AS category_name, 1 + (hashint8extended(s, l + 30) & 1048575) % 4 AS quantity
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) s
    CROSS JOIN sizes
    CROSS JOIN LATERAL generate_series(1, 1 + (hashint8extended(s, 10) & 1048575) % 3) l
    JOIN products p
      ON p.id = first_product + (hashint8extended(s, l + 20) & 9007199254740991) % products
    LEFT JOIN categories c ON c.id = p.category_id
    ORDER BY s, p.id, l
), lines AS (
    SELECT s, row_number() OVER (PARTITION BY s ORDER BY l) AS line, product_id, name, price,
           category_id, category_name, quantity,
           row_number() OVER (PARTITION BY s, category_id ORDER BY l) = 1 AS first_in_category,
           %(now)s::timestamptz - interval '365 days'
               + s * (interval '365 days' / (%(total)s::bigint + 1)) AS created_at
    FROM picked
), sales AS (
    INSERT INTO transactions (id, user_id, total, created_at)
    SELECT s,
           (SELECT first_user + (hashint8extended(s, 11) & 9007199254740991) % users FROM sizes),
           sum(price * quantity), min(created_at)
    FROM lines
    GROUP BY s
    ORDER BY s
    RETURNING id, user_id
)
INSERT INTO transaction_items (transaction_id, line, quantity, product_id, user_id, category_id,
    created_at, unit_price, amount, first_in_category, product_name, category_name)
SELECT s, line, quantity, product_id, user_id, category_id, created_at, price, price * quantity,
       first_in_category, name, category_name
FROM lines
JOIN sales ON sales.id = s
ORDER BY s, line

-- name: mark_sold :count
UPDATE products p
SET sold = true
WHERE EXISTS (SELECT FROM transaction_items i WHERE i.product_id = p.id)

-- name: seal :value
SELECT seal_sales()

-- Behind the numbers that the seed has given.
-- name: continue_numbers :one
SELECT setval(pg_get_serial_sequence('transactions', 'id'), greatest(max(id), 1)) AS last
FROM transactions
