-- Increments a counter; returns it and its time to live in ms. A key that has no expiry, for
-- whatever reason, gets one.
local function count(key, window)
    local counted, left = redis.call('INCRBY', key, 1), redis.call('PTTL', key)
    if left < 0 then
        redis.call('PEXPIRE', key, window)
        left = tonumber(window)
    end
    return counted, left
end
