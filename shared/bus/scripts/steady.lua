-- The ordinary step, in front of append: tokens of a request that its decode worker goes on with, and nothing else
-- is due. It reads a third of what `load` reads and does the same writes; whatever is not steady is left to append,
-- which compares everything again. Stands before common.lua, so that a step that is steady throughout makes nothing
-- of it. Keys and arguments are append's.
local REFRESH_EVERY = 16

local steady_outbox = {}
local milliseconds = nil

local function is_due(deadline)
  if deadline == '0' then return false end
  if not milliseconds then
    local t = redis.call('TIME')
    milliseconds = t[1] * 1000 + math.floor(t[2] / 1000)
  end
  return milliseconds > tonumber(deadline)
end

-- True when the tokens are journaled; false when nothing was changed.
local function steady(key, log, a)
  local choice, base, count = ARGV[a + 3], ARGV[a + 4], ARGV[a + 7]
  if ARGV[a + 2] ~= '' or ARGV[a + 8] ~= '' or count == '0' then return false end
  local length, hash = 'n:' .. choice, 'h:' .. choice
  local held = redis.call('HMGET', key, 'state', 'epoch', 'owner', length, hash, 'fin:' .. choice, 'deaths', 'cancel',
    'deadline', 'ev', 'chan')
  if held[1] ~= 'decode' or held[2] ~= ARGV[a] or held[3] ~= ARGV[a + 1] then return false end
  if held[4] ~= base or held[5] ~= ARGV[a + 5] or held[6] then return false end
  if held[7] ~= '0' or held[8] == '1' or is_due(held[9]) then return false end
  local ev = held[10] + 1
  if ev % REFRESH_EVERY == 1 then return false end
  if not redis.call('XADD', log, 'NOMKSTREAM', held[2] .. '-' .. ev, 'k', 'T', 'b', ARGV[a + 9]) then return false end
  redis.call('HSET', key, 'ev', ev, length, base + count, hash, ARGV[a + 6])
  local events = steady_outbox[held[11]]
  if not events then
    events = {}
    steady_outbox[held[11]] = events
  end
  events[#events + 1] = {string.match(key, '}:req:(.*)$'), tonumber(held[2]), ev, 'T', ARGV[a + 9]}
  return true
end

local answers, left = {}, {}
for i = 1, #KEYS / 2 do
  local key = KEYS[2 * i - 1]
  if not left[key] and steady(key, KEYS[2 * i], 10 * i - 9) then
    answers[i] = 0
  else
    left[key] = true -- and what comes later of the same request, so that its events keep their order
  end
end
if next(left) == nil then
  for channel, events in pairs(steady_outbox) do redis.call('PUBLISH', channel, cmsgpack.pack(events)) end
  return answers
end
