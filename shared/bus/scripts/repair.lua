-- repair: compares gw == caller and not done. The request goes on from what the client has.
-- ARGV: gateway, then the contents (see rewrite)
local r = load(KEYS[1], KEYS[2])
if not r or r.state == 'done' or r.gw ~= ARGV[1] or not rewrite(r, 2) then return 'refused' end
if r.left == 0 then
  term(r, 'finished', '', '', -1)
else
  requeue(r)
end
flush()
return 'repaired'
