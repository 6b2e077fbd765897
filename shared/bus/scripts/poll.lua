-- poll: keeps a request alive for its gateway, ends it when overdue, and reads its journal.
-- ARGV: gateway, id of the last entry known or ''
local r = load(KEYS[1], KEYS[2])
if not r then return {'gone'} end
if r.state ~= 'done' and r.gw == ARGV[1] then
  refresh(r)
  if r.deadline > 0 then ended(r) end
end
flush()
local from = ARGV[2] ~= '' and '(' .. ARGV[2] or '-'
return {'live', r.state, r.epoch, r.gw, redis.call('XRANGE', r.log, from, '+')}
