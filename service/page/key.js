// The key that a service may ask for: kept until the browser's tab is closed, and shown with every request.

const SLOT = "encnet-key";

export const keyHeader = () => {
  const key = sessionStorage.getItem(SLOT);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

/** Ask the person for the key; settles once there is one (true) or the question was sent away (false). */
export function askForKey() {
  const dialog = document.getElementById("lock");
  const field = document.getElementById("key");
  document.getElementById("wrong-key").hidden = sessionStorage.getItem(SLOT) === null;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((settle) => {
    dialog.addEventListener(
      "close",
      () => {
        if (dialog.returnValue === "given") {
          sessionStorage.setItem(SLOT, field.value.trim());
        }
        settle(dialog.returnValue === "given");
      },
      { once: true },
    );
  });
}
