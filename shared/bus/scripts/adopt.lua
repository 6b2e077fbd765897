-- adopt: compares that the request exists. Its events go to another gateway from now on.
-- ARGV: gateway, channel
local r = load(KEYS[1], KEYS[2])
if not r then return {'gone'} end
redis.call('HSET', r.key, 'gw', ARGV[1], 'chan', ARGV[2])
if r.state ~= 'done' then refresh(r) end
return {'live', r.state, r.epoch, ARGV[1], redis.call('XRANGE', r.log, '-', '+'), redis.call('HGET', r.key, 'job')}
