// Parallel regions on the calling thread's own team, so that they and torch's regions take turns on the same cores.
#pragma once

// Runs work(context) on up to `threads` threads, the caller among them; returns when all are through. `work` hands out
// its items by itself, so that a team of any size does the whole of it.
void scout_team_run(void (*work)(void*), void* context, int threads);
