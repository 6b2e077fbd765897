-- submit: compares that req is absent (a repeat of the same call answers as the first did).
-- ARGV: job, gateway, channel, prefill stream, decode stream, choices, budget ms, live ttl ms,
--       done ttl ms, nonce of this call, length of the prompt, then the contents (see rewrite).
local have = redis.call('HMGET', KEYS[1], 'state', 'gw', 'sub', 'entry')
if have[1] then
  if have[3] == ARGV[10] then return {'submitted', have[4]} end
  return {'conflict', have[1], have[2] or ''}
end
local budget = tonumber(ARGV[7])
redis.call('DEL', KEYS[2])
redis.call('XADD', KEYS[2], '0-1', 'k', 'M', 'b', '')
redis.call('XDEL', KEYS[2], '0-1')
redis.call('HSET', KEYS[1], 'job', ARGV[1], 'gw', ARGV[2], 'chan', ARGV[3], 'ps', ARGV[4], 'ds', ARGV[5],
  'nc', ARGV[6], 'left', ARGV[6], 'deadline', budget > 0 and now() + budget or 0, 'ttl', ARGV[8], 'keep', ARGV[9],
  'sub', ARGV[10], 't0', now(), 'state', 'queued', 'epoch', 0, 'ev', 0, 'owner', '', 'stream', ARGV[4], 'entry', '',
  'offer', '', 'address', '', 'deaths', 0, 'kills', 0, 'died', '', 'computed', '', 'bounce', 0, 'usage', '', 'cupto',
  -1, 'plen', ARGV[11])
local r = load(KEYS[1], KEYS[2])
rewrite(r, 12)
local id = ''
if r.left == 0 then
  term(r, 'finished', '', '', -1)
else
  id = requeue(r)
end
flush()
return {'submitted', id}
