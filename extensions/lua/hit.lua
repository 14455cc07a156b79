-- KEYS: the count; ARGV: its window in ms
-- Returns count, time left
return {count(KEYS[1], ARGV[1])}
