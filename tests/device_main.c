/* device_main.c - the main of tests that need a device: without one it says so and exits with 77.
 */
#include "kernels/kernels.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/base/error.h"

/* In a process of its own: a runtime that was used must not be forked. */
static int has_device(void) {
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        cq_stream s = {.table = cq_kernels_find(WAYS_TABLE)};
        int result = s.table ? s.table->memory->open(&s, 0)
                             : cq_fail(CQ_EUSAGE, "this build has no table " WAYS_TABLE);
        if (result != CQ_OK)
            fprintf(stderr, "skipped: %s\n", cq_error());
        _exit(result == CQ_OK ? 0 : 77);
    }
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status))
        return 1;
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    int status = has_device();
    if (status)
        return status;
    struct criterion_test_set *tests = criterion_initialize();
    if (criterion_handle_args(argc, argv, true))
        status = !criterion_run_all_tests(tests);
    criterion_finalize(tests);
    return status;
}
