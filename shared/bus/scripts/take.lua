-- take: compares offer == id and state = prefill, else STALE. Takes no ownership.
-- ARGV: stream, entry id
local r = load(KEYS[1], KEYS[2])
if stale(r, ARGV[1], ARGV[2]) then return {'stale'} end
if not is_offer(r, ARGV[1], ARGV[2]) or r.state ~= 'prefill' then return {'stale'} end
if ended(r) then
  flush()
  return {'stale'}
end
refresh(r)
return {'offer', r.epoch, r.owner, remaining(r), r.deaths, r.address, redis.call('HGET', r.key, 'job'),
  redis.call('XRANGE', r.log, '-', '+')}
