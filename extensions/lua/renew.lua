-- KEYS: groups... ARGV: the writer, a new word, its life in seconds
for i, word in ipairs(redis.call('MGET', unpack(KEYS))) do
    local marks, last = others(word, ARGV[1])
    if marks == '' then
        redis.call('SET', KEYS[i], ARGV[2], 'EX', ARGV[3])
    else
        redis.call('SET', KEYS[i], '!' .. marks, 'PX', last - now)
    end
end
