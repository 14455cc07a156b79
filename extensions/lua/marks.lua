-- The value of a marked group: '!', then each writer with the time in ms when its mark expires.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function mark(writer, ends)
    return string.format('%s=%.0f;', writer, ends)
end

-- The marks of other writers that still stand on a group, and when the last of them runs out.
local function others(word, writer)
    local marks, last = '', 0
    if word and string.byte(word) == 33 then
        for other, ends in string.gmatch(word, '(%w+)=(%d+);') do
            ends = tonumber(ends)
            if ends > now and other ~= writer then
                marks, last = marks .. mark(other, ends), math.max(last, ends)
            end
        end
    end
    return marks, last
end
