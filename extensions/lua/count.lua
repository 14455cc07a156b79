-- Count and remaining life, in ms, in one answer. A key that has no end, for whatever reason, gets
-- one.
local function count(key, window)
    local counted, left = redis.call('INCRBY', key, 1), redis.call('PTTL', key)
    if left < 0 then
        redis.call('PEXPIRE', key, window)
        left = tonumber(window)
    end
    return counted, left
end
