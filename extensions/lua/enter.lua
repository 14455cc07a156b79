-- Counts a visit, and looks up the entry that it asks for.
-- KEYS: the counter, if counted; then, if there is an entry to look up: lock, compressed entry,
-- entry, groups...
-- ARGV: window in ms (0: not counted), limit, a new word, its TTL in s, the lock's TTL in ms (0: no
-- lock), the lease in ms
-- Returns count, time left in ms; then generation ('' while a group is marked), state (1, 2: which
-- entry key matched; 0: compute it; -1: another request is computing it), the entry
local counted, left, at = 0, 0, 1
if ARGV[1] ~= '0' then
    counted, left = count(KEYS[1], ARGV[1])
    if counted > tonumber(ARGV[2]) then return {counted, left} end
    at = 2
end
if not KEYS[at] then return {counted, left} end
local words = redis.call('MGET', unpack(KEYS, at + 3))
for i, word in ipairs(words) do
    local group = KEYS[at + 2 + i]
    if not word then
        word = ARGV[3]
        redis.call('SET', group, word, 'EX', ARGV[4])
        words[i] = word
    elseif string.byte(word) == 33 then
        return {counted, left, '', 0}
    end
end
redis.call('PEXPIRE', KEYS[#KEYS], ARGV[6])
local generation = table.concat(words, ',')
for i, entry in ipairs(redis.call('MGET', KEYS[at + 1], KEYS[at + 2])) do
    if entry and string.sub(entry, 1, #generation + 1) == generation .. '|' then
        return {counted, left, generation, i, string.sub(entry, #generation + 2)}
    end
end
if ARGV[5] == '0' or redis.call('SET', KEYS[at], '1', 'NX', 'PX', ARGV[5]) then
    return {counted, left, generation, 0}
end
return {counted, left, generation, -1}
