;; What somebody does who works in a vm by Emacs's TRAMP. Each step prints a line, which the test knows.
(require 'tramp)
(setq print-escape-newlines t
      vc-handled-backends nil
      make-backup-files nil
      create-lockfiles nil
      tramp-verbose 1
      tramp-persistency-file-name nil)

(defun say (text &rest values)
  (princ (concat (apply #'format text values) "\n")))

(let* ((dir "/ssh:web.vm:/srv/two words/")
       (file (concat dir "it's ä.sh"))
       (default-directory dir))
  (say "mode %o, %S" (file-modes file) (directory-files dir nil "[^.]"))
  (find-file file)
  (say "it has %S" (buffer-string))
  (goto-char (point-max))
  (insert "echo ünd more\nexit 3\n")
  (save-buffer)
  (say "mode %o, %s" (file-modes file) (if (buffer-modified-p) "not saved" "saved"))
  (with-temp-buffer
    (say "it ends with %s" (process-file "./it's ä.sh" nil t nil))
    (say "it says %S" (buffer-string)))
  (say "shell: %S" (shell-command-to-string "hostname; pwd; id -un"))
  ;; One that goes on beside the editor, reads, and ends by itself.
  (let ((process (start-file-process "reader" (generate-new-buffer "reader") "sh" "-c" "read line; echo \"got $line\"; exit 5")))
    (set-process-sentinel process #'ignore)
    (process-send-string process "a line\n")
    (while (accept-process-output process 10))
    (say "beside: %s, %S" (process-exit-status process)
         (with-current-buffer (process-buffer process) (buffer-string))))
  ;; Bytes that are no text, through the shell and by a copy beside it.
  (let ((bytes (apply #'unibyte-string (mapcar (lambda (n) (logand 255 (* n 7919))) (number-sequence 1 40000))))
        (coding-system-for-write 'no-conversion))
    (with-temp-buffer
      (set-buffer-multibyte nil)
      (insert bytes)
      (write-region nil nil (concat dir "bytes") nil 'quiet)
      (write-region nil nil "/scp:web.vm:/srv/two words/copied bytes" nil 'quiet))
    (say "bytes: %s" (equal (shell-command-to-string "sha256sum < bytes; sha256sum < 'copied bytes'")
                            (let ((sum (secure-hash 'sha256 bytes))) (format "%s  -\n%s  -\n" sum sum)))))
  (rename-file file (concat dir "new name.sh"))
  (delete-file (concat dir "bytes"))
  (delete-file (concat dir "copied bytes"))
  (say "left: %S" (directory-files dir nil "[^.]")))

;; As somebody else, who may not write there.
(condition-case refused
    (with-temp-buffer
      (insert "not mine")
      (say "as %s" (let ((default-directory "/ssh:dev@web.vm:/")) (string-trim (shell-command-to-string "id -un"))))
      (write-region nil nil "/ssh:dev@web.vm:/srv/two words/new name.sh" nil 'quiet)
      (say "written"))
  (file-error (say "refused")))
