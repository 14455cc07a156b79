-- Terms of one and two letters, which no trigram index knows: an index of every letter and every
-- pair of neighbours. It is asked by its own query alone, for the few rows of a rare term; a common
-- term is soon met by reading in order. The cost keeps the planner from ever running the function
-- over rows instead of asking the index.
CREATE FUNCTION short_grams(text) RETURNS text[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE COST 100000 AS $$
    SELECT string_to_array($1, NULL) || ARRAY(
        SELECT letter || lead(letter) OVER ()
        FROM unnest(string_to_array($1, NULL)) letter
    )
$$;
CREATE INDEX products_grams_idx ON products USING gin (short_grams(search_text))
    WHERE retired_at IS NULL;

-- down
DROP INDEX products_grams_idx;
DROP FUNCTION short_grams;
