-- KEYS: the lock to release (optional), entries... ARGV: the entries' TTL in seconds, 1 if the
-- first key is the lock, the entries' contents...
local at = 1
if ARGV[2] == '1' then redis.call('DEL', KEYS[1]) at = 2 end
for i = at, #KEYS do redis.call('SET', KEYS[i], ARGV[i - at + 3], 'EX', ARGV[1]) end
