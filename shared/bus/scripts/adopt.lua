-- adopt: compares that the request exists and is not done, and its gateway when one is named. Its events go to another
--        gateway from now on. Of a request that is done nothing changes, not even its time to live: it is only read.
-- ARGV: gateway, channel, the gateway that must hold it now or ''
-- Answers as poll, then job and remaining ms
local r = load(KEYS[1], KEYS[2])
if not r then return {'gone'} end
local held_elsewhere = is_held_elsewhere(r, ARGV[1])
if r.state ~= 'done' and (ARGV[3] == '' or ARGV[3] == r.gw) then
  redis.call('HSET', r.key, 'gw', ARGV[1], 'chan', ARGV[2])
  r.gw = ARGV[1]
  refresh(r)
end
return {'live', r.state, r.epoch, r.gw, redis.call('XRANGE', r.log, '-', '+'), held_elsewhere,
  redis.call('HGET', r.key, 'job'), remaining(r)}
