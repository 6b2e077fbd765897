"""Every condition of every script: made to let everything pass, and the scenario that notices.

What is no guard is listed with its reason. `test_script_compares.py` checks that the two lists name each condition.
"""

from __future__ import annotations

from tests.integration import script_scenarios_back as back
from tests.integration import script_scenarios_ends as ends
from tests.integration import script_scenarios_owner as owner
from tests.integration import script_scenarios_tokens as held
from tests.integration.script_lab import Mutation

MUTATIONS = (
    # ---- common: which request, which entry, whose
    Mutation("common", "if not values[1] then", "if false then", held.nothing_revives_a_request),
    Mutation("common", "if r.deadline == 0 then", "if false then", ends.without_a_budget_there_is_no_deadline),
    Mutation("common", "if id ~= '' and redis", "if true and redis", back.a_swept_entry_comes_back, crashes=True),
    Mutation("common", "GROUP, id) == 1 then", "GROUP, id) >= 0 then", owner.an_undelivered_offer_stays),
    Mutation("common", "return r.entry == id and", "return true and", owner.begin_needs_the_standing_id),
    Mutation("common", "and r.stream == stream end", "and true end", owner.begin_needs_the_standing_stream),
    Mutation("common", "return r.offer == id and", "return true and", owner.take_needs_the_standing_offer),
    Mutation("common", "and r.ds == stream end", "and true end", owner.take_needs_the_decode_stream),
    Mutation("common", "if r and (is_entry", "if true and (is_entry", owner.begin_needs_a_request, crashes=True),
    Mutation("common", "(is_entry(r, stream, id) or", "(true or", owner.begin_needs_the_standing_id),
    Mutation("common", "or is_offer(r, stream, id)) then", "or true) then", owner.begin_needs_the_standing_id),
    Mutation("common", "return r and r.state", "return true and r.state", owner.nobody_owns_what_is_gone, crashes=True),
    Mutation("common", "r.state ~= 'done' and r.epoch", "true and r.epoch", owner.nobody_owns_what_has_ended),
    Mutation("common", "and r.epoch == tonumber(epoch)", "and true", owner.only_the_owners_epoch),
    Mutation("common", "and r.owner == owner", "and true", owner.only_the_owner),
    Mutation("common", "return r.gw ~= gateway and", "return", owner.a_gateway_holds_its_own_itself),
    # ---- common: nothing that expired comes back
    Mutation("common", "r.log, 'NOMKSTREAM', r.epoch", "r.log, r.epoch", held.an_append_revives_no_journal),
    Mutation(
        "common",
        "if not journal(r, 'M', marker(at, '\\144')) then",
        "if journal(r, 'M', marker(at, '\\144')) == 0 then",
        held.a_requeue_revives_no_journal,
    ),
    Mutation(
        "common",
        "if not journal(r, 'E', blob) then",
        "if journal(r, 'E', blob) == 0 then",
        held.an_end_revives_no_journal,
    ),
    Mutation(
        "common",
        "if not journal(r, 'T', blob) then",
        "if journal(r, 'T', blob) == 0 then",
        held.an_append_revives_no_journal,
    ),
    Mutation(
        "common",
        "if not journal(r, 'M', marker(at, ARGV[first + 1])) then",
        "if journal(r, 'M', marker(at, ARGV[first + 1])) == 0 then",
        held.a_repair_revives_no_journal,
    ),
    # ---- common: cancels and deadlines
    Mutation("common", "if r.cancel == '1' then", "if false then", ends.a_cancel_waits_for_the_owner),
    Mutation("common", "elseif r.deadline > 0 and", "elseif true and", ends.without_a_budget_there_is_no_deadline),
    Mutation("common", "and now() > r.deadline then", "and true then", ends.with_a_budget_the_rest_is_told),
    # ---- common: which tokens
    Mutation("common", "if not held[1] then", "if false then", held.an_unknown_choice_is_refused, crashes=True),
    Mutation("common", "is_there = n == base + count", "is_there = true", held.a_repeat_is_known_by_length),
    Mutation("common", "and held[2] == h\n", "and true\n", held.a_repeat_is_known_by_hash),
    Mutation("common", "if ended_by then", "if false then", held.a_finished_choice_takes_no_more),
    Mutation("common", "return is_there and ended_by", "return ended_by", held.a_finished_choice_takes_no_more),
    Mutation("common", "and ended_by == finish and", "and", held.a_finished_choice_takes_no_more),
    Mutation("common", "if n ~= base or", "if", held.append_compares_the_length_itself),
    Mutation("common", "or held[2] ~= h_base then", "then", held.append_needs_the_hash),
    Mutation("common", "if is_there and finish", "if finish", held.append_needs_the_hash),
    Mutation(
        "common", "if is_there and finish == '' then", "if is_there then", held.a_finish_is_no_repeat_of_its_tokens
    ),
    Mutation("common", "if count == 0 and finish == ''", "if finish == ''", held.append_needs_the_length),
    Mutation(
        "common", "if count == 0 and finish == '' then", "if count == 0 then", held.a_finish_without_tokens_counts
    ),
    Mutation("common", "if finish ~= '' then", "if true then", held.append_needs_the_length),
    Mutation("common", "if ARGV[a + 2] ~= '' then", "if true then", held.repair_of_a_part_goes_on),
    # ---- common: suspects
    Mutation("common", "if r.state == 'prefill' and r.computed", "if r.computed", back.decode_computes_no_prompt),
    # ---- submit, begin
    Mutation("submit", "if have[1] then", "if false then", owner.a_conflict_names_the_holder),
    Mutation("submit", "if have[3] == ARGV[10] then", "if true then", owner.a_conflict_names_the_holder),
    Mutation("submit", "budget > 0 and now()", "now()", ends.without_a_budget_there_is_no_deadline),
    Mutation("submit", "if r.left == 0 then", "if false then", held.submit_of_the_whole_ends),
    Mutation("begin", "if stale(r, ARGV[1], ARGV[2]) then", "if false then", owner.begin_needs_the_standing_id),
    Mutation("begin", "r.state == 'prefill' and r.owner", "r.owner", owner.begin_is_no_repeat_of_a_commit),
    Mutation("begin", "and r.owner == owner", "", owner.begin_is_for_the_queue),
    Mutation("begin", "if not repeated then", "if true then", owner.begin_repeats_for_its_nonce),
    Mutation("begin", "if r.state ~= 'queued' then", "if false then", owner.begin_is_for_the_queue),
    Mutation("begin", "if ended(r) then", "if false then", ends.an_overdue_begin_ends),
    Mutation("begin", "if not raise(r) then", "if raise(r) == 0 then", held.a_begin_revives_no_journal, crashes=True),
    # ---- offer, take, touch
    Mutation("offer", "not owned(r, ARGV[1], ARGV[2]) or", "", owner.offer_is_the_owners),
    Mutation("offer", "or r.state ~= 'prefill' then", "then", owner.offer_is_for_prefill),
    Mutation("take", "if stale(r, ARGV[1], ARGV[2]) then", "if false then", held.a_take_of_what_is_gone, crashes=True),
    Mutation("take", "if not is_offer(r, ARGV[1], ARGV[2]) or", "if", owner.take_is_not_for_the_entry),
    Mutation("take", "if ended(r) then", "if false then", ends.an_overdue_take_ends),
    Mutation("touch", "if not owned(r, ARGV[1], ARGV[2]) then", "if false then", owner.touch_is_the_owners),
    Mutation("touch", "if ended(r) then", "if false then", ends.an_overdue_touch_ends),
    Mutation("touch", "if ARGV[3] == '1' then", "if true then", back.only_the_worker_says_that_the_prompt_is_computed),
    Mutation("touch", "r.offer ~= '' and #redis", "#redis", owner.touch_sees_no_offer_before_one_is_made, crashes=True),
    Mutation("touch", "r.offer, r.offer) == 1", "r.offer, r.offer) >= 0", owner.touch_sees_the_offer_go),
    # ---- append
    Mutation("append", "if not owned(r, ARGV[a], ARGV[a + 1]) then", "if false then", owner.append_is_the_owners),
    Mutation("append", "if usage ~= '' and", "if", held.usage_is_kept),
    Mutation("append", "if code == REFUSED then", "if false then", held.an_append_revives_no_journal),
    Mutation("append", "if r.ev > before and", "if", back.a_repeat_acquits_nobody),
    Mutation("append", "and tonumber(ARGV[a + 7]) > 0 then", "then", back.an_end_without_tokens_acquits_nobody),
    Mutation("append", "if r.state == 'decode' then", "if true then", back.prefills_own_token_acquits_nobody),
    Mutation("append", "if r.left == 0 then", "if false then", held.the_last_choice_ends_the_request),
    Mutation("append", "if ended(r) then", "if false then", ends.an_overdue_append_ends),
    Mutation("append", "if r.ev % REFRESH_EVERY == 1 then", "if false then", ends.appending_keeps_it_alive),
    Mutation("append", "if code == BEHIND then", "if false then", held.append_needs_the_hash, crashes=True),
    # ---- commit
    Mutation("commit", "if r and r.state", "if true and r.state", owner.commit_of_what_is_gone, crashes=True),
    Mutation("commit", "r.state == 'decode' and r.owner", "r.owner", owner.commit_is_no_repeat_of_a_begin),
    Mutation("commit", "and r.owner == owner and", "and", owner.commit_repeats_for_its_owner),
    Mutation("commit", "and is_entry(r, stream, id) then", "then", owner.commit_repeats_for_its_owner),
    Mutation("commit", "if stale(r, stream, id) then", "if false then", owner.commit_of_what_is_gone, crashes=True),
    Mutation("commit", "if not is_offer(r, stream, id) or", "if", owner.commit_needs_the_offer),
    Mutation("commit", "or r.epoch ~= tonumber(ARGV[3]) or", "or", owner.commit_needs_the_epoch),
    Mutation("commit", "or nonce ~= ARGV[4] then", "then", owner.commit_needs_the_nonce),
    Mutation("commit", "if ARGV[6] ~= '' then", "if true then", held.commit_keeps_its_usage),
    Mutation("commit", "if ended(r) then", "if false then", ends.an_overdue_commit_ends),
    Mutation("commit", "if code == BEHIND or code", "if code", owner.commit_tells_the_difference),
    Mutation(
        "commit",
        "if code == BEHIND or code == REFUSED then",
        "if code == BEHIND then",
        owner.commit_refuses_an_unknown_choice,
    ),
    Mutation(
        "commit",
        "    if code == REFUSED then return",
        "    if false then return",
        owner.commit_refuses_an_unknown_choice,
        crashes=True,
    ),
    Mutation("commit", "if r.left == 0 then", "if false then", held.commit_of_the_last_token_ends),
    Mutation("commit", "if r.died == 'prefill' then", "if true then", back.reaching_decode_acquits_nobody_else),
    # ---- sweep
    Mutation("sweep", "if stale(r, stream, id) then", "if false then", owner.sweep_leaves_what_stands_for_nothing),
    Mutation("sweep", "if ended(r) then", "if false then", ends.an_overdue_sweep_ends),
    Mutation(
        "sweep", "bounces = offered and r.bounce", "bounces = r.bounce", back.a_swept_entry_of_prefill_is_no_offer
    ),
    Mutation("sweep", "and r.bounce < max_bounces", "", back.an_offer_bounces_so_often),
    Mutation("sweep", "if not (bounces and why == 'failed') then", "if true then", back.failing_that_bounces_is_free),
    Mutation("sweep", "if not (bounces and why", "if not (why", back.failing_is_charged_though_nobody_died),
    Mutation("sweep", "(bounces and why == 'failed')", "(bounces)", back.dying_with_an_offer_that_bounces_is_a_kill),
    Mutation("sweep", "if bounces then", "if false then", back.a_swept_offer_is_offered_again),
    Mutation("sweep", "charged = why == 'failed' or (", "charged = (", back.failing_is_charged_though_nobody_died),
    Mutation("sweep", "(why == 'died' and r.owner", "(r.owner", back.letting_go_is_no_death),
    Mutation("sweep", "and r.owner ~= '')", ")", back.dying_with_what_is_queued_is_no_death),
    Mutation("sweep", "if not charged then", "if false then", back.letting_go_is_no_death),
    Mutation("sweep", "role = offered and 'decode' or", "role =", back.failing_is_charged_though_nobody_died),
    Mutation("sweep", "if why == 'failed' or not", "if not", back.failing_is_charged_after_the_prompt_too),
    Mutation("sweep", "not offered and (role", "(role", back.dying_with_an_offer_is_no_death),
    Mutation("sweep", "(role == 'decode' or", "(", back.dying_in_decode_is_charged),
    Mutation("sweep", "or r.computed == '')", "or true)", back.dying_after_the_prompt_is_not_its_doing),
    Mutation(
        "sweep",
        "if not term(r, 'error', QUARANTINED",
        "if true or term(r, 'error', QUARANTINED",
        back.two_deaths_end_it,
    ),
    Mutation("sweep", "if r.deaths >= max_deaths or", "if", back.two_deaths_end_it),
    Mutation("sweep", "or (r.kills or 0) >= max_kills then", "then", back.many_kills_end_it),
    Mutation("sweep", "if not raise(r) then", "if raise(r) == 0 then", held.a_sweep_revives_no_journal),
    # ---- requeue, fail
    Mutation("requeue", "if not owned(r, ARGV[1], ARGV[2]) then", "if false then", owner.requeue_is_the_owners),
    Mutation("requeue", "if ended(r) then", "if false then", ends.an_overdue_requeue_ends),
    Mutation("requeue", "if not raise(r) then", "if raise(r) == 0 then", held.a_requeue_revives_no_journal),
    Mutation("fail", "if not owned(r, ARGV[1], ARGV[2]) then", "if false then", owner.fail_is_the_owners),
    # ---- cancel
    Mutation("cancel", "if not r then", "if false then", held.nothing_revives_a_request, crashes=True),
    Mutation("cancel", "if r.state == 'done' then", "if false then", ends.an_ended_one_is_not_cancelled),
    Mutation("cancel", "if ARGV[6] ~= '' and r.gw", "if r.gw", owner.cancel_without_a_name_is_anybodys),
    Mutation("cancel", "and r.gw ~= ARGV[6] then", "and false then", owner.cancel_is_the_holding_gateways),
    Mutation("cancel", "if held[1] and", "if", ends.a_stop_string_of_no_choice_is_nothing, crashes=True),
    Mutation("cancel", "and tonumber(held[1]) >= length and", "and", ends.a_stop_string_beyond_the_journal_waits),
    Mutation("cancel", "and not held[2] then", "then", ends.a_choice_is_stopped_once),
    Mutation(
        "cancel",
        "if not journal(r, 'T', ARGV[a + 3]) then",
        "if journal(r, 'T', ARGV[a + 3]) == 0 then",
        held.a_stop_string_revives_no_journal,
    ),
    Mutation("cancel", "if num_choices > 0 then", "if true then", ends.a_cancel_waits_for_the_owner),
    Mutation("cancel", "if r.left == 0 then", "if true then", ends.a_stop_string_cuts_its_choice),
    Mutation("cancel", "elseif r.state == 'queued' or", "elseif", ends.a_queued_one_is_cancelled_at_once),
    Mutation("cancel", "or ARGV[4] == '1' then", "then", ends.force_ends_at_once),
    Mutation("cancel", "return r.state == 'done' and 'ended'", "return 'ended'", ends.a_cancel_waits_for_the_owner),
    # ---- repair, poll, adopt, forget_consumer
    Mutation("repair", "if not r or", "if", owner.repair_of_what_is_gone, crashes=True),
    Mutation("repair", "or r.state == 'done' or", "or", held.repair_of_an_ended_one_is_refused),
    Mutation("repair", "or r.gw ~= ARGV[1] or", "or", owner.repair_is_the_gateways),
    Mutation("repair", "or not rewrite(r, 2) then", "or rewrite(r, 2) == 0 then", held.a_repair_revives_no_journal),
    Mutation("repair", "if r.left == 0 then", "if false then", held.repair_of_the_whole_ends),
    Mutation("poll", "if not r then", "if false then", held.nothing_revives_a_request, crashes=True),
    Mutation("poll", "r.state ~= 'done' and r.gw", "r.gw", ends.an_ended_one_is_kept_no_longer),
    Mutation("poll", "and r.gw == ARGV[1] then", "then", owner.poll_of_a_stranger_keeps_nothing_alive),
    Mutation("poll", "ARGV[2] ~= '' and '('", "'('", owner.poll_reads_past_an_id, crashes=True),
    Mutation("adopt", "if not r then", "if false then", held.nothing_revives_a_request, crashes=True),
    Mutation("adopt", "if r.state ~= 'done' and", "if", ends.an_ended_one_is_kept_no_longer),
    Mutation("adopt", "(ARGV[3] == '' or", "(true or", owner.adoption_names_who_must_hold_it),
    Mutation("adopt", "or ARGV[3] == r.gw) then", "or true) then", owner.adoption_names_who_must_hold_it),
    Mutation("claim", "and held ~= ARGV[1] then", "and false then", owner.a_claim_needs_what_was_seen),
    Mutation("claim", "if ARGV[2] ~= '' then", "if true then", owner.a_claim_is_taken_off),
    Mutation(
        "forget_consumer", "1, ARGV[1]) > 0 then", "1, ARGV[1]) < 0 then", owner.a_consumer_that_holds_entries_stays
    ),
)

NOT_GUARDS = (
    ("common", "not clock", "reads the time once a call"),
    ("common", "not events", "makes the list of a channel"),
    ("common", "r.usage ~= ''", "writes an empty usage where none is known"),
    ("common", "r.state ~= 'done'", "in ended: every caller has compared the state before"),
    ("common", "r.state == 'done'", "what ended answers"),
    ("common", "r.computed == ''", "saves a write"),
    ("common", "r.deaths > 0", "saves a write"),
    ("claim", "held ~= ''", "what stands for nothing may be claimed whatever was seen; and it saves a write"),
    ("take", "r.state ~= 'prefill'", "an offer stands in no other state, as check_standing of the model sees"),
    ("touch", "{1, 0, offer_live", "how the answer is written"),
    ("append", "usage ~= r.usage", "saves a write"),
    ("commit", "r.state ~= 'prefill'", "an offer stands in no other state, as check_standing of the model sees"),
    ("cancel", "raise(r)", "TERM forgets a request without a journal as well"),
    ("poll", "r.deadline > 0", "without a deadline the pending cancel is left to the owner; either way it ends once"),
)
