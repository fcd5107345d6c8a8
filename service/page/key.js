// The key that a service may ask for: kept until the browser's tab is closed, and shown with every request.

const SLOT = "encnet-key";

let key = stored();

function stored() {
  try {
    return sessionStorage.getItem(SLOT);
  } catch {
    return null; // browsers can be set to store nothing: then the key is this page's alone
  }
}

function keep(given) {
  key = given;
  try {
    sessionStorage.setItem(SLOT, key);
  } catch {
    // as above
  }
}

export const keyHeader = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Ask the person for the key; settles once there is one (true) or the question was sent away (false). */
export function askForKey() {
  const dialog = document.getElementById("lock");
  const field = document.getElementById("key");
  document.getElementById("wrong-key").hidden = key === null;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((settle) => {
    dialog.addEventListener(
      "close",
      () => {
        if (dialog.returnValue === "given") {
          keep(field.value.trim());
        }
        settle(dialog.returnValue === "given");
      },
      { once: true },
    );
  });
}
