// Parallel regions on the calling thread's OpenMP team, which torch uses too, so that cores are not oversubscribed.
#pragma once

// Runs work(context) on up to `threads` threads, the caller included; returns when all have finished. `work` must hand
// out its items itself, so that a team of any size completes it.
void scout_team_run(void (*work)(void*), void* context, int threads);
