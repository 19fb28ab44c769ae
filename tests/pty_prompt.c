/// pty_prompt.c - drives the prompt through a pseudo-terminal: Ctrl-C in loops, steps and
/// completion.
///
///     pty_prompt PROGRAM TRIALS
///
/// Every trial starts something endless, presses Ctrl-C, and measures the time until a line typed
/// afterwards is answered; then it asks for a variable set before. Prints one line; exits 1 when a
/// prompt took over a second or a variable was lost.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct terminal {
    int fd;
    pid_t child;
    char seen[1 << 20]; ///< what came since the last `wanted`
    size_t n;
} terminal;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void give_up(const terminal *t, const char *what) {
    size_t from = t->n > 2000 ? t->n - 2000 : 0;
    printf("%s; the terminal's last words:\n%s\n", what, t->seen + from);
    kill(t->child, SIGKILL);
    exit(1);
}

static void start(terminal *t, const char *program) {
    struct winsize size = {.ws_row = 40, .ws_col = 120};
    t->fd = posix_openpt(O_RDWR | O_NOCTTY);
    if (t->fd < 0 || grantpt(t->fd) || unlockpt(t->fd))
        give_up(t, "no pseudo-terminal");
    ioctl(t->fd, TIOCSWINSZ, &size);
    t->child = fork();
    if (t->child == 0) {
        setsid();
        int end = open(ptsname(t->fd), O_RDWR);
        ioctl(end, TIOCSCTTY, 0);
        for (int i = 0; i < 3; i++)
            dup2(end, i);
        close(t->fd);
        setenv("TERM", "xterm", 1);
        execl(program, program, (char *)NULL);
        _exit(127);
    }
}

static void type(const terminal *t, const char *text) {
    size_t n = strlen(text);
    while (n > 0) {
        ssize_t k = write(t->fd, text, n);
        if (k < 0 && errno != EINTR && errno != EAGAIN)
            give_up(t, "the terminal takes no input");
        if (k > 0) {
            text += k;
            n -= (size_t)k;
        }
    }
}

/* Reads until `text` has come, at most `seconds`; what came before it is forgotten. */
static bool wanted(terminal *t, const char *text, double seconds) {
    double ends = now() + seconds;
    for (;;) {
        char *at = strstr(t->seen, text);
        if (at) {
            size_t used = (size_t)(at - t->seen) + strlen(text);
            memmove(t->seen, t->seen + used, t->n - used + 1);
            t->n -= used;
            return true;
        }
        int left = (int)((ends - now()) * 1000);
        struct pollfd p = {.fd = t->fd, .events = POLLIN};
        if (left <= 0 || poll(&p, 1, left) <= 0)
            return false;
        if (t->n > sizeof t->seen / 2) {
            memmove(t->seen, t->seen + t->n - 4096, 4096);
            t->n = 4096;
        }
        ssize_t k = read(t->fd, t->seen + t->n, sizeof t->seen - t->n - 1);
        if (k <= 0)
            return false;
        for (ssize_t i = 0; i < k; i++)
            if (t->seen[t->n + (size_t)i] == 0)
                t->seen[t->n + (size_t)i] = ' ';
        t->n += (size_t)k;
        t->seen[t->n] = 0;
    }
}

static void say(terminal *t, const char *line, const char *answer, double seconds) {
    type(t, line);
    type(t, "\r");
    if (!wanted(t, answer, seconds)) {
        char text[400];
        snprintf(text, sizeof text, "no answer '%s' to '%s' in %.0f s", answer, line, seconds);
        give_up(t, text);
    }
}

/* What never ends, and how often Ctrl-C has to be pressed: a loop of protected calls swallows one.
 */
static const struct {
    const char *name, *text;
    int presses;
} endless[] = {
    {"while", "print('be' .. 'gun') while true do end\r", 1},
    {"for", "print('be' .. 'gun') for i = 1, 1e12 do end\r", 1},
    {"repeat", "print('be' .. 'gun') repeat until false\r", 1},
    {"C functions", "print('be' .. 'gun') while true do os.time() end\r", 1},
    {"function of before", "print('be' .. 'gun') f()\r", 1},
    {"recursion", "print('be' .. 'gun') g(1)\r", 1},
    {"protected calls", "print('be' .. 'gun') while true do pcall(h) end\r", 2},
    {"training", "print('be' .. 'gun') train()\r", 1},
    {"evaluation",
     "print('be' .. 'gun') while true do cq.eval.compare(teacher, student, data:holdout()) end\r",
     1},
    {"completion", "cq.ba\t\t", 1},
    {"half a line", "x = 1 +", 1},
};
enum { N_ENDLESS = sizeof endless / sizeof *endless };

static void prepare(terminal *t) {
    if (!wanted(t, "> ", 20))
        give_up(t, "no prompt");
    say(t, "function f() local s = 0 while true do s = s + 1 end end print('o' .. 'k1')", "ok1", 5);
    say(t,
        "function g(n) return 1 + g(n % 3) end g = function(n) while true do n = n + 1 end end "
        "print('o' .. 'k2')",
        "ok2", 5);
    say(t, "function h() local s = 0 for i = 1, 1e6 do s = s + i end end print('o' .. 'k3')", "ok3",
        5);
    say(t,
        "teacher = cq.model.open 'recipes/lab/teacher' student = teacher:quantize { preset = 'all' "
        "}"
        " print('o' .. 'k4')",
        "ok4", 20);
    say(t,
        "data = cq.data.open('recipes/lab/teacher/train.jsonl', { model = teacher, seq = 128, "
        "batch = 8, micro = 8,"
        " holdout = 'recipes/lab/teacher/holdout.jsonl' }) print('o' .. 'k5')",
        "ok5", 20);
    say(t,
        "terms = { cq.loss.kl {}, cq.loss.cka { tokens = 64 } } adam = cq.optim.adamw(student) "
        "print('o' .. 'k6')",
        "ok6", 20);
    say(t,
        "cq.plan { teacher = teacher, student = student, adam = adam, terms = terms, data = data, "
        "eval = true };"
        " student:calibrate(data:take(8)) print('o' .. 'k7')",
        "ok7", 60);
    say(t,
        "function train() for step = 1, 1e9 do for part in cq.batch(data, step):split() do"
        " cq.distill(teacher, student, part, terms):backward { kl = 1, cka = 1 } end "
        "adam:step(1e-5) end end"
        " print('o' .. 'k8')",
        "ok8", 20);
}

/* Seconds from the last Ctrl-C to an answer. */
static double trial(terminal *t, int i) {
    char line[100], answer[100];
    snprintf(line, sizeof line, "kept = %d print('se' .. 't')", 7919 * i);
    say(t, line, "set", 5);
    type(t, endless[i % N_ENDLESS].text);
    if (strstr(endless[i % N_ENDLESS].text, "gun") && !wanted(t, "begun", 5))
        give_up(t, "it did not begin");
    usleep((useconds_t)(1000 * (5 + i * 37 % 200)));
    for (int k = 0; k < endless[i % N_ENDLESS].presses; k++) {
        if (k)
            usleep(100000);
        type(t, "\003");
    }
    double pressed = now();
    usleep(50000);
    snprintf(line, sizeof line, "print('kept ' .. kept, 'a' .. 'live')");
    snprintf(answer, sizeof answer, "kept %d\talive", 7919 * i);
    type(t, line);
    type(t, "\r");
    while (!wanted(t, "alive", 0.5)) {
        if (now() - pressed > 10)
            give_up(t, endless[i % N_ENDLESS].name);
    }
    double spent = now() - pressed;
    snprintf(line, sizeof line, "print(kept == %d and 'in' .. 'tact' or 'lo' .. 'st')", 7919 * i);
    say(t, line, "intact", 5);
    return spent;
}

/* What else a person does: several lines, help, completion, history, the last value. */
static void habits(terminal *t) {
    say(t, "?cq.loss.kl", "KL(teacher || student)", 5);
    say(t, "6 * 7", "42", 5);
    say(t, "_ + 1", "43", 5);
    type(t, "function lines()\r");
    type(t, "return 'three' .. 'lines'\r");
    say(t, "end print(lines())", "threelines", 5);
    type(t, "cq.balance.rat\t");
    if (!wanted(t, "io", 5)) // only what is new is drawn
        give_up(t, "completion does not complete cq.balance.rat");
    type(t, "\003");
    if (!wanted(t, "^C", 5))
        give_up(t, "a Ctrl-C on a line is not answered");
    say(t, "print('hist' .. 'ory')", "history", 5);
    type(t, "\033[A\r");
    if (!wanted(t, "history", 5))
        give_up(t, "the last line does not come back");
}

/* Ctrl-D until the program ends: between two lines the terminal is not raw and swallows one. */
static int leave(terminal *t) {
    int status = 0;
    for (int i = 0; i < 50; i++) {
        ssize_t k = write(t->fd, "\004", 1); // fails when it has ended already
        (void)k;
        wanted(t, "never said", 0.1);
        usleep(10000);
        if (waitpid(t->child, &status, WNOHANG) == t->child)
            return status;
    }
    give_up(t, "Ctrl-D does not end it");
    return 1;
}

int main(int argc, char **argv) {
    static terminal t;
    if (argc != 3) {
        fprintf(stderr, "usage: pty_prompt PROGRAM TRIALS\n");
        return 2;
    }
    int trials = atoi(argv[2]), late = 0, status = 0;
    double slowest = 0;
    const char *where = "nothing";
    alarm((unsigned)(120 + 3 * trials)); // whatever hangs, the test ends
    start(&t, argv[1]);
    prepare(&t);
    habits(&t);
    for (int i = 0; i < trials; i++) {
        double spent = trial(&t, i);
        late += spent > 1;
        if (spent > slowest) {
            slowest = spent;
            where = endless[i % N_ENDLESS].name;
        }
    }
    status = leave(&t);
    printf("%d Ctrl-C, %d prompts later than 1 s, slowest %.2f s (%s), variables intact\n", trials,
           late, slowest, where);
    return late > 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}
