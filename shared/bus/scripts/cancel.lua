-- cancel: compares that the request exists and is not done, and its gateway when one is named.
-- ARGV: outcome, code, message, force, upto, gateway or '', number of choices to end, then four
--       each: choice, length, hash, finishing event
local r = load(KEYS[1], KEYS[2])
if not r then return 'gone' end
if r.state == 'done' then return 'done' end
if ARGV[6] ~= '' and r.gw ~= ARGV[6] then return 'not_yours' end
local num_choices = tonumber(ARGV[7])
for i = 1, num_choices do
  local a = 4 + 4 * i
  local c, length = ARGV[a], tonumber(ARGV[a + 1])
  local held = redis.call('HMGET', r.key, 'n:' .. c, 'fin:' .. c)
  if held[1] and tonumber(held[1]) >= length and not held[2] then
    r.ev = r.ev + 1
    if not journal(r, 'T', ARGV[a + 3]) then return 'gone' end
    r.left = r.left - 1
    redis.call('HSET', r.key, 'ev', r.ev, 'n:' .. c, length, 'h:' .. c, ARGV[a + 2], 'fin:' .. c, 'stop', 'left', r.left)
    emit(r, 'T', ARGV[a + 3])
  end
end
if num_choices > 0 then
  if r.left == 0 then term(r, 'finished', '', '', tonumber(ARGV[5])) end
elseif r.state == 'queued' or ARGV[4] == '1' then
  if raise(r) then term(r, ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5])) end
else
  redis.call('HSET', r.key, 'cancel', '1', 'cout', ARGV[1], 'ccode', ARGV[2], 'cmsg', ARGV[3], 'cupto', ARGV[5])
end
flush()
return r.state == 'done' and 'ended' or 'pending'
