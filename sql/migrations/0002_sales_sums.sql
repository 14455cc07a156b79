-- Sums of days that are over, so that a report over years reads hundreds of rows, not millions.
--
-- A sale itself touches none of this: rows that every sale of a day had to lock would let only one
-- sell at a time. Days are summed once they are over (seal_sales, called by the application's
-- upkeep; calling it late or never costs speed, not truth), and a report adds to the sums what lies
-- outside them. A refund of a sealed sale is taken off the sums by a trigger.

-- Every day before `until` (UTC) is in the sums. One row.
CREATE TABLE sales_sealed (
    one   boolean PRIMARY KEY DEFAULT true CONSTRAINT sales_sealed_one_check CHECK (one),
    until date NOT NULL
);
INSERT INTO sales_sealed (until) VALUES ('1970-01-01');

-- `sales` counts first lines and so sums to orders over all categories; `orders` counts sales with
-- this category. `lines` and `line_amount` hold refunded lines, too: what a download will hold.
CREATE TABLE sales_days (
    day           date NOT NULL,
    category_id   bigint,
    category_name text,
    orders        bigint NOT NULL,
    sales         bigint NOT NULL,
    items         bigint NOT NULL,
    amount        numeric NOT NULL,
    lines         bigint NOT NULL,
    line_amount   numeric NOT NULL,
    CONSTRAINT sales_days_key UNIQUE NULLS NOT DISTINCT (day, category_id)
);

CREATE TABLE sales_product_months (
    month        date NOT NULL,
    product_id   bigint NOT NULL,
    product_name text NOT NULL,
    orders       bigint NOT NULL,
    sales        bigint NOT NULL,
    items        bigint NOT NULL,
    amount       numeric NOT NULL,
    CONSTRAINT sales_product_months_pkey PRIMARY KEY (month, product_id)
);

CREATE FUNCTION seal_sales() RETURNS date LANGUAGE plpgsql AS $$
DECLARE
    -- Ten minutes behind midnight no sale of yesterday can still be under way: the application's
    -- statements and idle transactions end long before.
    over date := (now() AT TIME ZONE 'UTC' - interval '10 minutes')::date;
    sealed date;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('sales_sums')) THEN
        RETURN NULL;
    END IF;
    SELECT until INTO sealed FROM sales_sealed;
    IF sealed >= over THEN
        RETURN sealed;
    END IF;
    INSERT INTO sales_days
    SELECT (created_at AT TIME ZONE 'UTC')::date, category_id, max(category_name),
           count(*) FILTER (WHERE first_in_category AND NOT refunded),
           count(*) FILTER (WHERE line = 1 AND NOT refunded),
           coalesce(sum(quantity) FILTER (WHERE NOT refunded), 0),
           coalesce(sum(amount) FILTER (WHERE NOT refunded), 0),
           count(*), sum(amount)
    FROM transaction_items
    WHERE created_at >= sealed::timestamp AT TIME ZONE 'UTC'
      AND created_at < over::timestamp AT TIME ZONE 'UTC'
    GROUP BY 1, 2;
    INSERT INTO sales_product_months
    SELECT date_trunc('month', created_at AT TIME ZONE 'UTC')::date, product_id, max(product_name),
           count(*) FILTER (WHERE NOT refunded),
           count(*) FILTER (WHERE line = 1 AND NOT refunded),
           coalesce(sum(quantity) FILTER (WHERE NOT refunded), 0),
           coalesce(sum(amount) FILTER (WHERE NOT refunded), 0)
    FROM transaction_items
    WHERE created_at >= date_trunc('month', sealed::timestamp) AT TIME ZONE 'UTC'
      AND created_at < date_trunc('month', over::timestamp) AT TIME ZONE 'UTC'
    GROUP BY 1, 2;
    UPDATE sales_sealed SET until = over;
    RETURN over;
END $$;

-- A sale into a sealed day would be in no sum: better no sale than a wrong one.
CREATE FUNCTION refuse_sealed_day() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF new.created_at < (SELECT until::timestamp AT TIME ZONE 'UTC' FROM sales_sealed) THEN
        RAISE EXCEPTION 'the day of % is sealed', new.created_at;
    END IF;
    RETURN new;
END $$;
CREATE TRIGGER transactions_unsealed BEFORE INSERT ON transactions
    FOR EACH ROW EXECUTE FUNCTION refuse_sealed_day();

CREATE FUNCTION take_refunds_off() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    sealed date;
BEGIN
    IF NOT EXISTS (SELECT FROM after_it n JOIN before_it o USING (transaction_id, line)
                   WHERE n.refunded AND NOT o.refunded) THEN
        RETURN NULL;
    END IF;
    -- Behind this lock no day is being sealed, and one refund at a time changes sums.
    PERFORM pg_advisory_xact_lock(hashtext('sales_sums'));
    SELECT until INTO sealed FROM sales_sealed;
    UPDATE sales_days d
    SET orders = d.orders - r.orders, sales = d.sales - r.sales, items = d.items - r.items,
        amount = d.amount - r.amount
    FROM (
        SELECT (n.created_at AT TIME ZONE 'UTC')::date AS day, n.category_id,
               count(*) FILTER (WHERE n.first_in_category) AS orders,
               count(*) FILTER (WHERE line = 1) AS sales,
               sum(n.quantity) AS items, sum(n.amount) AS amount
        FROM after_it n
        JOIN before_it o USING (transaction_id, line)
        WHERE n.refunded AND NOT o.refunded AND n.created_at < sealed::timestamp AT TIME ZONE 'UTC'
        GROUP BY 1, 2
    ) r
    WHERE d.day = r.day AND d.category_id IS NOT DISTINCT FROM r.category_id;
    UPDATE sales_product_months m
    SET orders = m.orders - r.orders, sales = m.sales - r.sales, items = m.items - r.items,
        amount = m.amount - r.amount
    FROM (
        SELECT date_trunc('month', n.created_at AT TIME ZONE 'UTC')::date AS month, n.product_id,
               count(*) AS orders, count(*) FILTER (WHERE line = 1) AS sales,
               sum(n.quantity) AS items, sum(n.amount) AS amount
        FROM after_it n
        JOIN before_it o USING (transaction_id, line)
        WHERE n.refunded AND NOT o.refunded
          AND n.created_at < date_trunc('month', sealed::timestamp) AT TIME ZONE 'UTC'
        GROUP BY 1, 2
    ) r
    WHERE m.month = r.month AND m.product_id = r.product_id;
    RETURN NULL;
END $$;
CREATE TRIGGER transaction_items_refunded AFTER UPDATE ON transaction_items
    REFERENCING OLD TABLE AS before_it NEW TABLE AS after_it
    FOR EACH STATEMENT EXECUTE FUNCTION take_refunds_off();

-- down
DROP TRIGGER transaction_items_refunded ON transaction_items;
DROP TRIGGER transactions_unsealed ON transactions;
DROP FUNCTION take_refunds_off, refuse_sealed_day, seal_sales;
DROP TABLE sales_product_months, sales_days, sales_sealed;
