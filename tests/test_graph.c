/// test_graph.c - which passes are run, recorded and played, on a memory that only counts.
#include "core/base/error.h"
#include "core/base/process.h"
#include "core/tensor/graph.h"
#include <criterion/criterion.h>

static int recordings, plays, forgotten, live;
static bool recording, refuses;
static int64_t changes_now;

static int record(cq_stream *s) {
    (void)s;
    recording = true;
    return CQ_OK;
}
static int recorded(cq_stream *s, void **graph) {
    (void)s;
    recording = false;
    *graph = refuses ? NULL : (void *)(intptr_t)++recordings;
    live += !refuses;
    return refuses ? cq_fail(CQ_EIO, "no") : CQ_OK;
}
static int play(cq_stream *s, void *graph) {
    (void)s;
    plays += graph != NULL;
    return CQ_OK;
}
static void forget(cq_stream *s, void *graph) {
    (void)s;
    forgotten += graph != NULL;
    live--;
}
static int64_t changes(void) { return changes_now; }
static void close_device(cq_stream *s) { (void)s; }

static const cq_memory memory = {.close = close_device,
                                 .record = record,
                                 .recorded = recorded,
                                 .play = play,
                                 .forget = forget,
                                 .changes = changes};
static const cq_kernels table = {.name = "counts", .memory = &memory};

/* A pass that counts how often it is asked, for real and while recorded. */
typedef struct asked {
    int run, kept, status;
} asked;
static int pass(cq_stream *s, void *argument) {
    asked *a = argument;
    (void)s;
    *(recording ? &a->kept : &a->run) += 1;
    return a->status;
}

static cq_stream stream;
static void begin(void) {
    recordings = plays = forgotten = live = 0;
    changes_now = 0;
    refuses = false;
    stream = (cq_stream){.table = &table};
    cr_assert_eq(cq_graphs_set(&stream, true), CQ_OK);
}
static void end(void) {
    cq_graphs_set(&stream, false);
    cr_expect_eq(live, 0);
}
static int once(asked *a, int64_t number) {
    cq_graph_key key = {a, {number}};
    return cq_graphs_run(&stream, &key, pass, a);
}
static void expect(const asked *a, int run, int kept, int played) {
    cr_expect(a->run == run && a->kept == kept && plays == played,
              "run %d, kept %d, played %d, wanted %d, %d, %d", a->run, a->kept, plays, run, kept,
              played);
}

TestSuite(graph, .init = begin, .fini = end);

Test(graph, the_second_time_is_recorded) {
    asked a = {0};
    for (int i = 0; i < 4; i++)
        cr_expect_eq(once(&a, 7), CQ_OK);
    expect(&a, 1, 1, 3);
    cr_expect_eq(cq_graphs_played(&stream), 3);
    once(&a, 8);
    expect(&a, 2, 1, 3);
}

Test(graph, nothing_is_recorded_where_that_is_off) {
    asked a = {0};
    cq_graphs_set(&stream, false);
    for (int i = 0; i < 3; i++)
        once(&a, 7);
    expect(&a, 3, 0, 0);
    cr_expect_eq(cq_graphs_played(&stream), 0);
}

Test(graph, what_cannot_be_recorded_runs) {
    asked a = {0};
    refuses = true;
    for (int i = 0; i < 3; i++)
        cr_expect_eq(once(&a, 7), CQ_OK);
    expect(&a, 3, 1, 0);
}

Test(graph, an_error_of_the_pass_is_that_of_running_it) {
    asked a = {0};
    once(&a, 7);
    a.status = CQ_ENUMERIC;
    cr_expect_eq(once(&a, 7), CQ_ENUMERIC);
    expect(&a, 2, 1, 0);
    cr_expect_eq(live, 0);
}

Test(graph, other_memory_forgets) {
    asked a = {0};
    once(&a, 7);
    once(&a, 7);
    changes_now++;
    once(&a, 7);
    expect(&a, 2, 1, 1);
    cr_expect_eq(forgotten, 1);
    once(&a, 7);
    expect(&a, 2, 2, 2);
}

Test(graph, other_arguments_forget) {
    asked a = {0};
    once(&a, 7);
    once(&a, 7);
    cq_graphs_forget(&stream);
    once(&a, 7);
    expect(&a, 2, 1, 1);
}

Test(graph, the_longest_unused_one_leaves) {
    asked a = {0};
    for (int i = 0; i < 2; i++)
        for (int64_t n = 0; n < 32; n++)
            once(&a, n);
    expect(&a, 32, 32, 32);
    once(&a, 0);
    once(&a, 32);
    once(&a, 32); /* instead of 1 */
    expect(&a, 33, 33, 34);
    cr_expect_eq(forgotten, 1);
    once(&a, 0);
    once(&a, 2);
    expect(&a, 33, 33, 36);
    once(&a, 1);
    expect(&a, 34, 33, 36);
}

Test(graph, many_that_come_once_leave_the_recorded_ones_alone) {
    asked a = {0};
    once(&a, 0);
    for (int64_t n = 1; n < 200; n++)
        once(&a, n);
    once(&a, 0);
    expect(&a, 200, 1, 1);
    for (int64_t n = 1000; n < 2000; n++)
        once(&a, n);
    once(&a, 0);
    expect(&a, 1200, 1, 2);
    once(&a, 1999);
    once(&a, 1700); /* forgotten */
    expect(&a, 1201, 2, 3);
}

Test(graph, a_stop_is_seen_before_a_pass_is_played) {
    asked a = {0};
    volatile int stop = 0;
    once(&a, 7);
    once(&a, 7);
    cq_stop_watch(&stop);
    stop = 1;
    cr_expect_eq(once(&a, 7), CQ_ESTOPPED);
    cq_stop_watch(NULL);
    expect(&a, 1, 1, 1);
}
