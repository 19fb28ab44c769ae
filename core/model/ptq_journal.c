/// ptq_journal.c - DIR.partial: what of the work is on disk, and whether it is this work.
///
///     ckaqad ptq 1 <sha256>      of what decides the bytes: source files, rules, documents
///     files                      everything but the weights has been copied
///     unit <u> <unreached>       written, its data synced before; one line for each u = 0, 1, ...
///
/// Policy: a thread of its own syncs a unit while the next is computed. A line counts when its end
/// of line is there. What came after the last one is done again and gives the same bytes, so pieces
/// of it in the files do no harm.
#include "core/base/error.h"
#include "core/base/hash.h"
#include "core/base/process.h"
#include "core/model/export_impl.h"
#include "core/model/ptq_impl.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_BYTES = 4096 };
static const char mark[] = "ckaqad ptq 1 ";
static const char *const activations[] = {"activations.0", "activations.1", "activations.2"};

static void add_text(cq_sha256 *h, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    cq_sha256_add(h, text, n < (int)sizeof text ? (size_t)n : sizeof text);
}

/* Names, lengths and times of the source's files: 63 GB are not read for a hash. */
static int add_source(cq_sha256 *h, const char *dir) {
    char *names, path[PATH_BYTES];
    CQ_TRY(cq_folder_list(&names, dir));
    int status = CQ_OK;
    for (char *at = names, *end; !status && (end = strchr(at, '\n')); at = end + 1) {
        int64_t bytes, changed;
        *end = 0;
        status = cq_path_join(path, sizeof path, dir, at);
        if (!status && !cq_file_stat(path, &bytes, &changed))
            add_text(h, "%s %" PRId64 " %" PRId64 "\n", at, bytes, changed);
    }
    free(names);
    return status;
}

static int identify(const cq_ptq *q, char hex[65]) {
    cq_sha256 h;
    const cq_model *m = q->m;
    cq_sha256_init(&h);
    add_text(&h, "%s %d %" PRId64 " %d %d\n", CQ_VERSION, (int)m->scales, q->o.shard_bytes,
             (int)q->calibrates, (int)m->compute);
    CQ_TRY(add_source(&h, m->dir));
    for (int64_t i = 0; i < m->n_params; i++)
        add_text(&h, "%s %d\n", m->param[i]->name, (int)m->param[i]->quantized);
    for (int64_t i = 0; i < m->n_linears; i++)
        add_text(&h, "%d\n", (int)m->linear[i]->act_quant);
    for (int64_t i = 0; i < q->o.n_batches && q->calibrates; i++) {
        const cq_batch *b = q->batches[i];
        cq_sha256_add(&h, b->ids, (size_t)b->tokens * sizeof *b->ids);
        cq_sha256_add(&h, b->starts, (size_t)(b->n_docs + 1) * sizeof *b->starts);
    }
    cq_sha256_hex(&h, hex);
    return CQ_OK;
}

static int journal_path(const cq_ptq *q, char path[PATH_BYTES]) {
    return cq_path_join(path, PATH_BYTES, q->partial, "journal");
}

/* Reads the journal of this work: true when it is one that can be gone on with. */
static bool read_journal(cq_ptq *q, const char *path, const char *hex) {
    char *text, header[128];
    int64_t bytes;
    if (!cq_file_exists(path) || cq_file_read(&text, &bytes, path))
        return false;
    snprintf(header, sizeof header, "%s%s\nfiles\n", mark, hex);
    bool same = !strncmp(text, header, strlen(header));
    for (const char *at = text + (same ? strlen(header) : 0), *end;
         same && (end = strchr(at, '\n')); at = end + 1) {
        int64_t unit, unreached;
        if (sscanf(at, "unit %" SCNd64 " %" SCNd64, &unit, &unreached) != 2 ||
            unit != q->facts.done || unit >= q->facts.units)
            break;
        q->facts.done++;
        q->facts.unreached = unreached;
    }
    q->facts.continued = q->facts.saved = q->facts.done;
    free(text);
    return same;
}

/* A folder that no work of ours made is not touched. */
static int check_partial(const cq_ptq *q, const char *path) {
    char *names, *text;
    int64_t bytes;
    struct stat info;
    if (lstat(q->partial, &info))
        return errno == ENOENT ? CQ_OK : cq_fail(CQ_EIO, "%s: %s", q->partial, strerror(errno));
    bool ours = false;
    if (cq_file_exists(path)) {
        CQ_TRY(cq_file_read(&text, &bytes, path));
        ours = !strncmp(text, mark, strlen(mark)) || bytes == 0;
        free(text);
    } else if (S_ISDIR(info.st_mode)) {
        CQ_TRY(cq_folder_list(&names, q->partial));
        ours = !*names || cq_export_is_ours(q->partial, true);
        free(names);
    }
    return ours ? CQ_OK
                : cq_fail(CQ_EUSAGE,
                          "%s: was not made by an export that was stopped, wanted that name free",
                          q->partial);
}

static int append(const cq_ptq *q, const char *format, ...) {
    char text[160];
    va_list args;
    va_start(args, format);
    ssize_t n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ssize_t put = write(q->journal, text, (size_t)n);
    if (put != n)
        return cq_fail(CQ_EIO, "%s/journal: %s", q->partial, strerror(put < 0 ? errno : ENOSPC));
    return fsync(q->journal) && errno != EINVAL
               ? cq_fail(CQ_EIO, "%s/journal: %s", q->partial, strerror(errno))
               : CQ_OK;
}

static int open_file(int *fd, const char *folder, const char *name, int flags) {
    char path[PATH_BYTES];
    CQ_TRY(cq_path_join(path, sizeof path, folder, name));
    *fd = open(path, flags | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    return *fd < 0 ? cq_fail(CQ_EIO, "%s: %s", path, strerror(errno)) : CQ_OK;
}

/* A torn last line would run into the next: the file ends after the last whole one. */
static int trim(const cq_ptq *q, const char *path) {
    char *text;
    int64_t bytes;
    CQ_TRY(cq_file_read(&text, &bytes, path));
    const char *last = strrchr(text, '\n');
    int64_t keep = last ? last + 1 - text : 0;
    free(text);
    return ftruncate(q->journal, keep) ? cq_fail(CQ_EIO, "%s: %s", path, strerror(errno)) : CQ_OK;
}

int cq_ptq_journal_open(cq_ptq *q) {
    char path[PATH_BYTES], hex[65];
    CQ_TRY(journal_path(q, path));
    CQ_TRY(check_partial(q, path));
    CQ_TRY(identify(q, hex));
    bool goes_on = read_journal(q, path, hex);
    if (!goes_on) {
        CQ_TRY(cq_folder_remove(q->partial));
        CQ_TRY(cq_folder_make(q->partial));
    }
    CQ_TRY(open_file(&q->journal, q->partial, "journal", O_WRONLY | O_APPEND));
    if (goes_on)
        CQ_TRY(trim(q, path));
    else {
        CQ_TRY(append(q, "%s%s\n", mark, hex));
        CQ_TRY(cq_export_files(q->m, q->partial, true));
        CQ_TRY(append(q, "files\n"));
    }
    for (int i = 0; i < 3 && q->calibrates; i++)
        CQ_TRY(open_file(&q->activation[i], q->partial, activations[i], O_RDWR));
    return CQ_OK;
}

static int save(cq_ptq *q) {
    int file = (int)(q->save_unit % 3);
    CQ_TRY(cq_st_folder_sync(q->out));
    if (q->calibrates && fsync(q->activation[file]) && errno != EINVAL)
        return cq_fail(CQ_EIO, "%s/activations.%d: %s", q->partial, file, strerror(errno));
    CQ_TRY(append(q, "unit %" PRId64 " %" PRId64 "\n", q->save_unit, q->save_unreached));
    q->facts.saved = q->save_unit + 1;
    return CQ_OK;
}

/* The message is this thread's own: it is carried over. */
static void *saver(void *work) {
    cq_ptq *q = work;
    q->save_status = save(q);
    if (q->save_status)
        snprintf(q->save_message, sizeof q->save_message, "%s", cq_error());
    return NULL;
}

int cq_ptq_save_wait(cq_ptq *q) {
    if (!q->saving)
        return CQ_OK;
    pthread_join(q->saver, NULL);
    q->saving = false;
    return q->save_status ? cq_fail(q->save_status, "%s", q->save_message) : CQ_OK;
}

/* The files of the residual stream rotate among three: while unit u is written, the output of u - 2
 * stays, from which a process goes on whose last note is u - 2. */
int cq_ptq_save(cq_ptq *q) {
    CQ_TRY(cq_ptq_save_wait(q));
    q->save_unit = q->facts.done - 1;
    q->save_unreached = q->facts.unreached;
    q->saving = !pthread_create(&q->saver, NULL, saver, q);
    return q->saving ? CQ_OK : save(q);
}

int cq_ptq_journal_remove(cq_ptq *q) {
    char path[PATH_BYTES];
    for (int i = 0; i < 4; i++) {
        CQ_TRY(cq_path_join(path, sizeof path, q->partial, i < 3 ? activations[i] : "journal"));
        if (unlink(path) && errno != ENOENT)
            return cq_fail(CQ_EIO, "%s: %s", path, strerror(errno));
    }
    return CQ_OK;
}

static int fail_rows(const cq_ptq *q, int file, int reason) {
    return cq_fail(CQ_EIO, "%s/activations.%d: %s", q->partial, file,
                   reason ? strerror(reason) : "ends too early");
}

int cq_ptq_rows_read(const cq_ptq *q, int file, int64_t row, int64_t n, float *to) {
    int64_t wide = q->m->config.hidden * (int64_t)sizeof *to, at = row * wide, left = n * wide;
    for (char *p = (char *)to; left > 0;) {
        ssize_t got = pread(q->activation[file], p, (size_t)left, at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return fail_rows(q, file, got < 0 ? errno : 0);
        p += got, at += got, left -= got;
    }
    return CQ_OK;
}

int cq_ptq_rows_write(const cq_ptq *q, int file, int64_t row, int64_t n, const float *from) {
    int64_t wide = q->m->config.hidden * (int64_t)sizeof *from, at = row * wide, left = n * wide;
    for (const char *p = (const char *)from; left > 0;) {
        ssize_t put = pwrite(q->activation[file], p, (size_t)left, at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return fail_rows(q, file, put < 0 ? errno : ENOSPC);
        p += put, at += put, left -= put;
    }
    return CQ_OK;
}
