-- KEYS: groups... ARGV: the writer, the mark's life in ms
local writer, life = ARGV[1], tonumber(ARGV[2])
for i, word in ipairs(redis.call('MGET', unpack(KEYS))) do
    local marks, last = others(word, writer)
    marks = '!' .. marks .. mark(writer, now + life)
    redis.call('SET', KEYS[i], marks, 'PX', math.max(life, last - now))
end
