-- KEYS: lock or an entry, entries... ARGV: their life in seconds, whether the first is a lock,
-- their contents...
local at = 1
if ARGV[2] == '1' then redis.call('DEL', KEYS[1]) at = 2 end
for i = at, #KEYS do redis.call('SET', KEYS[i], ARGV[i - at + 3], 'EX', ARGV[1]) end
