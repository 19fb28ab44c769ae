/// fake_server.c - an OpenAI-compatible server for tests/recipes/generate.sh: one thread, one
/// request a connection. Prints its port, then answers until it is killed.
///
/// GET /v1/models lists "fake". POST /v1/chat/completions answers with the first integer of the
/// question plus 4 in a \boxed{}; it wants "model": "fake", and, when started with a key, that key.
/// /empty/v1 lists no models, /odd/v1 answers without choices.
#include <arpa/inet.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROOM = 1 << 20 };

static void answer(int to, int status, const char *body) {
    char head[160];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                     "Connection: close\r\n\r\n",
                     status, status == 200 ? "OK" : "No", strlen(body));
    if (write(to, head, (size_t)n) < 0 || write(to, body, strlen(body)) < 0)
        perror("write");
}

/* The whole request, headers and body. */
static int receive(int from, char *text) {
    ssize_t n = 0, got;
    while (n < ROOM - 1 && (got = read(from, text + n, (size_t)(ROOM - 1 - n))) > 0) {
        text[n += got] = 0;
        const char *body = strstr(text, "\r\n\r\n"), *length = strstr(text, "Content-Length: ");
        if (body && (ssize_t)(body + 4 - text) + (length ? atol(length + 16) : 0) <= n)
            return 1;
    }
    return 0;
}

static long first_integer(const char *body) {
    const char *p = strstr(body, "content");
    while (p && *p && !isdigit((unsigned char)*p))
        p++;
    return p ? strtol(p, NULL, 10) : 0;
}

static void serve(int to, const char *text, const char *key) {
    const char *body = strstr(text, "\r\n\r\n"), *given = strstr(text, "Authorization: Bearer ");
    char reply[256];
    if (key && (!given || strncmp(given + 22, key, strlen(key)) != 0))
        return answer(to, 401, "{\"error\": {\"message\": \"who are you?\"}}");
    if (strncmp(text, "GET /empty/v1/models ", 21) == 0)
        return answer(to, 200, "{\"object\": \"list\", \"data\": []}");
    if (strncmp(text, "GET ", 4) == 0)
        return answer(to, 200, "{\"object\": \"list\", \"data\": [{\"id\": \"fake\"}]}");
    if (strncmp(text, "POST /odd/", 10) == 0)
        return answer(to, 200, "{\"id\": \"x\"}");
    if (!strstr(body, "\"model\":\"fake\""))
        return answer(to, 404, "{\"error\": {\"message\": \"no such model\"}}");
    snprintf(reply, sizeof reply,
             "{\"choices\": [{\"finish_reason\": \"stop\", \"message\": {\"role\": \"assistant\", "
             "\"content\": \"It is \\\\boxed{%ld}.\"}}], \"usage\": {\"completion_tokens\": 7}}",
             first_integer(body) + 4);
    answer(to, 200, reply);
}

int main(int argc, char **argv) {
    static char text[ROOM];
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof at;
    int door = socket(AF_INET, SOCK_STREAM, 0);
    if (door < 0 || bind(door, (struct sockaddr *)&at, sizeof at) || listen(door, 64) ||
        getsockname(door, (struct sockaddr *)&at, &size)) {
        perror("fake_server");
        return 1;
    }
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    for (int to; (to = accept(door, NULL, NULL)) >= 0; close(to))
        if (receive(to, text))
            serve(to, text, argc > 1 ? argv[1] : NULL);
    return 1;
}
