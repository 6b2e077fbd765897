-- begin: compares entry == id and state = queued, else STALE. RAISEs and takes ownership.
-- ARGV: stream, entry id, owner
local r = load(KEYS[1], KEYS[2])
local owner = ARGV[3]
if stale(r, ARGV[1], ARGV[2]) then return {'stale'} end
local repeated = r.state == 'prefill' and r.owner == owner
if not repeated then
  if r.state ~= 'queued' then return {'stale'} end
  if ended(r) then
    flush()
    return {'ended'}
  end
  if not raise(r) then return {'stale'} end
  redis.call('HSET', r.key, 'owner', owner, 'state', 'prefill', 'computed', '')
end
return {'begun', r.epoch, remaining(r), r.deaths, redis.call('HGET', r.key, 'job'), redis.call('XRANGE', r.log, '-', '+')}
