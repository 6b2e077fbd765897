-- claim: compares that the idempotency key stands for nothing, or for what the caller saw. Then it stands for the
--        new value, or for nothing.
-- KEYS: the idempotency key. ARGV: value seen or '', new value or '' to take it off, ttl ms
-- Answers 'claimed', or what it stands for and how long still (ms)
local held = redis.call('GET', KEYS[1]) or ''
if held ~= '' and held ~= ARGV[1] then return {held, redis.call('PTTL', KEYS[1])} end
if ARGV[2] ~= '' then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
elseif held ~= '' then
  redis.call('DEL', KEYS[1])
end
return 'claimed'
