-- fail: compares epoch and owner. The owner ends the request with an error.
-- ARGV: epoch, owner, code, message
local r = load(KEYS[1], KEYS[2])
if not owned(r, ARGV[1], ARGV[2]) then return 'refused' end
term(r, 'error', ARGV[3], ARGV[4], -1)
flush()
return 'ended'
